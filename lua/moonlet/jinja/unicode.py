#!/usr/bin/env python3
"""Writes unicode.lua: the character classes and case mappings of this Python's str methods.

    python3 unicode.py > unicode.lua

Jinja templates call str.upper, str.isalpha, repr and the like, so the tables are taken from those
methods themselves. A class is a list of run lengths that alternate outside, inside, outside, ...
from code point 0; a mapping is a list of groups `first count step delta`; `special` holds the
mappings to more than one character. All numbers are hexadecimal.
"""
import sys
import unicodedata

CHARS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
# Word_Break MidLetter, MidNumLet and Single_Quote: with the categories below this is the
# property Case_Ignorable of Unicode section 3.13, which decides the final sigma.
MID = "'.:\u00b7\u0387\u055f\u05f4\u2018\u2019\u2024\u2027\ufe13\ufe52\ufe55\uff07\uff0e\uff1a"

CLASSES = {
    "alpha": str.isalpha,
    "decimal": str.isdecimal,
    "digit": str.isdigit,
    "numeric": str.isnumeric,
    "lower": str.islower,
    "upper": str.isupper,
    "title": lambda c: unicodedata.category(c) == "Lt",
    "printable": str.isprintable,
    "id_start": str.isidentifier,
    "id_continue": lambda c: ("a" + c).isidentifier(),
    "ignorable": lambda c: unicodedata.category(c) in ("Mn", "Me", "Cf", "Lm", "Sk") or c in MID,
}
MAPPINGS = {
    "to_upper": str.upper,
    "to_lower": str.lower,
    "to_title": str.title,
    "to_fold": str.casefold,
}


def runs(test):
    out, inside, start = [], False, 0
    for c in CHARS:
        if test(c) != inside:
            out.append(ord(c) - start)
            start, inside = ord(c), not inside
    if inside:
        out.append(0x110000 - start)
    return out


def groups(pairs):
    out = []
    for c, d in pairs:
        if out:
            first, count, step, delta = out[-1]
            gap = c - (first + (count - 1) * step)
            if d == delta and (count == 1 and gap <= 2 or gap == step):
                out[-1] = [first, count + 1, gap, delta]
                continue
        out.append([c, 1, 1, d])
    return [n for group in out for n in group]


def hexadecimal(n):
    return f"-{-n:x}" if n < 0 else f"{n:x}"


def emit(name, numbers):
    print(f"  {name} = [[")
    line = ""
    for n in map(hexadecimal, numbers):
        if len(line) + len(n) + 1 > 96:
            print(line)
            line = ""
        line += (" " if line else "") + n
    print(f"{line}\n  ]],")


print("-- Written by unicode.py beside this file (Unicode "
      f"{unicodedata.unidata_version}, Python {sys.version.split()[0]}); do not edit.")
print("return {")
for name, test in CLASSES.items():
    emit(name, runs(test))
special = {}
for name, convert in MAPPINGS.items():
    pairs = []
    for c in CHARS:
        d = convert(c)
        if name in ("to_title", "to_fold") and d == (c.upper() if name == "to_title" else c.lower()):
            continue                    # only what differs from the mapping it falls back to
        if len(d) != 1:
            special.setdefault(name, []).append((ord(c), d))
        elif d != c or name in ("to_title", "to_fold"):
            pairs.append((ord(c), ord(d) - ord(c)))
    emit(name, groups(pairs))
print("  special = {")
for name, pairs in special.items():
    print(f"    {name} = {{")
    for c, d in pairs:
        print(f"      [0x{c:x}] = \"" + "".join(f"\\u{{{ord(x):x}}}" for x in d) + '",')
    print("    },")
print("  },")
print("}")
