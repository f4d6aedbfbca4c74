"""Answers of Python's json and of the reference safetensors library, one line each.

oracle.py dumps FILE     FILE: little-endian doubles -> json.dumps of each
oracle.py verdicts FILE  FILE: images, each behind its length as <I4 -> "1" if safetensors takes it
oracle.py tensors FILE   FILE: a safetensors file -> name, dtype, shape and bytes in hex
"""
import json
import struct
import sys

command, path = sys.argv[1:]
data = open(path, "rb").read()

if command == "dumps":
    for (x,) in struct.iter_unpack("<d", data):
        print(json.dumps(x))
elif command == "verdicts":
    import safetensors

    at = 0
    while at < len(data):
        (n,) = struct.unpack_from("<I", data, at)
        at += 4 + n
        try:
            safetensors.deserialize(data[at - n : at])
            print(1)
        except Exception:
            print(0)
elif command == "tensors":
    import safetensors

    for name, t in sorted(safetensors.deserialize(data)):
        print(name, t["dtype"], *t["shape"], bytes(t["data"]).hex())
