"""Runs a compiler and keeps what it says in OBJECT.txt; shows it where the compiler fails."""

import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
with open(command[command.index("-o") + 1] + ".txt", "w") as log:
    log.write(done.stdout)
if done.returncode:
    sys.stdout.write(done.stdout)
raise SystemExit(done.returncode)
