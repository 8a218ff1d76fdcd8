"""What the kernels become on each chip, without one: ``python -m omnimamba_kernels.report triton`` or ``cuda``.

Triton's are compiled for the report, every launch of every operation: ``calls`` says what is asked of the operations,
``ahead`` notes and compiles the launches, ``resources`` reads what the compilers say of them, ``table`` shows it.
``cuda`` reads what nvcc left in the checkout's build.
"""
