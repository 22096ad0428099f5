#!/usr/bin/env bash
# safetensors says "No such file or directory" of a file that is there and whole, when the process has no file descriptor
# left or may not read it. The exception is FileNotFoundError with neither errno nor filename, so that nothing in it tells.
#
# Expected: what open() says of the same file at the same moment: OSError 24, "Too many open files", and PermissionError.
# Who loads many shards beside many open files, or a checkpoint of another user, looks for a file that is not missing.
#
# Seen with: safetensors 0.8.0 (numpy, safe_open and load_file), Python 3.11, Linux; 0.4.5 and 0.3.0 the same, the name quoted.
# Fails with: FREE=1, which leaves descriptors free and the file readable.
set -euo pipefail
SAFETENSORS=${SAFETENSORS:-0.8.0}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "safetensors==$SAFETENSORS" "numpy==2.2.6"
chmod 755 "$work"

cat > "$work/try.py" << 'PY'
import os
import resource
import sys

import numpy
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

place, free = sys.argv[1], sys.argv[2] == "1"
file = f"{place}/model.safetensors"
save_file({"weight": numpy.ones(3, numpy.float32)}, file)
os.chmod(file, 0o644)


def told(name, way):
    try:
        way(file)
        return f"{name}: opened"
    except Exception as error:
        said = f"{type(error).__name__} {error}".replace(file, "FILE")
        return f"{name}: {said} (errno {getattr(error, 'errno', None)})"


WAYS = {
    "open": lambda path: open(path, "rb").close(),
    "safe_open": lambda path: safe_open(path, framework="numpy").__enter__(),
    "load_file": load_file,
}


def look(when):
    found = [f"{when}: {told(name, way)}" for name, way in WAYS.items()]
    print(*found, sep="\n")
    return found


look("before")
held = []
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
while not free:
    try:
        held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        break
full = look("no descriptor left")
for each in held:
    os.close(each)
if not free:
    os.chmod(file, 0)
if os.geteuid() == 0:
    os.seteuid(65534)
unread = look("not readable")

ok = "Too many open files" in full[0] and "PermissionError" in unread[0]
for said in (*full[1:], *unread[1:]):
    ok &= said.endswith("FileNotFoundError No such file or directory: FILE (errno None)")
print("safetensors says that a file which is there does not exist" if ok else "it does not hold any more")
sys.exit(not ok)
PY
"$work/venv/bin/python" "$work/try.py" "$work" "${FREE:-0}"
