"""What the Triton kernels become on each chip, without one: every launch of every operation, compiled ahead of time.

``calls`` says what is asked of the operations, ``ahead`` notes and compiles the launches, ``resources`` reads what the
compilers say of them, ``table`` shows it: ``python -m omnimamba_kernels.report triton``.
"""
