"""What runs inside a sandbox: handed to a bare Python as text, so it imports the standard library alone.

    script    a program of its own; its output is all that is wanted of it
    serve     a program whose functions a judge calls
    judge     tests, which call the functions of a program that another sandbox serves

A program and its tests never share a process. The judge sends arguments and gets values back as JSON, out of which it
builds numbers, texts and containers, and nothing else: no object of the program's own, whose `__eq__` could say yes to
everything. The verdict goes through a file descriptor that only the judge has. So a program can print, exit, or kill
what it likes, and passes only by returning what the tests compare with.
"""

import builtins
import collections
import decimal
import fractions
import importlib
import itertools
import json
import os
import resource
import sys
import traceback
import types
from typing import Any

MOST_ELEMENTS = 1_000_000  # of an iterator that is sent on as the values it gives


def enter(payload, limits):
    """Give up every privilege that is left, then set the limits, which cannot be raised again."""
    if payload["uid"] is not None:
        os.setgroups([])
        os.setresgid(payload["uid"], payload["uid"], payload["uid"])
        os.setresuid(payload["uid"], payload["uid"], payload["uid"])
    mega = 2**20
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory_mb"] * mega),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * mega),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, 64 * mega),
    ):
        if kind != resource.RLIMIT_NPROC or payload["count_processes"]:
            resource.setrlimit(kind, (value, value))
    sys.set_int_max_str_digits(0)


def module(name, program):
    """Run a program's top level as the module `name`, and return that."""
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(compile(program, f"<{name}>", "exec"), made.__dict__)
    return made


# -- values as JSON ---------------------------------------------------------------------------------------------------

SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
MAPPINGS = {
    "dict": dict, "OrderedDict": collections.OrderedDict, "Counter": collections.Counter,
    "defaultdict": lambda items: collections.defaultdict(None, items),
}  # fmt: skip
TEXTS = {
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": decimal.Decimal,
    "Fraction": fractions.Fraction,
}


def encode(value: Any, opaque: Any) -> Any:
    """Return a value as JSON; what is no plain value becomes what `opaque` makes of it."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    name = kind.__name__
    if SEQUENCES.get(name) is kind or kind is collections.deque:
        return [name, [encode(element, opaque) for element in value]]
    if kind in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
        return [name, [[encode(key, opaque), encode(element, opaque)] for key, element in value.items()]]
    if kind in (bytes, bytearray):
        return [name, value.hex()]
    if kind in (decimal.Decimal, fractions.Fraction):
        return [name, str(value)]
    if kind is complex:
        return [name, [value.real, value.imag]]
    if kind is range:
        return [name, [value.start, value.stop, value.step]]
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return encode(value.item(), opaque)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a namedtuple equals a tuple
        return ["tuple", [encode(element, opaque) for element in value]]
    if hasattr(kind, "__next__") or kind in (type({}.keys()), type({}.values()), type({}.items())):
        ends = "iterator" if hasattr(kind, "__next__") else "list"
        return [ends, [encode(element, opaque) for element in itertools.islice(iter(value), MOST_ELEMENTS)]]
    return opaque(value)


def decode(said: Any, opaque: Any) -> Any:
    """Return the value that `encode` was given: of Python's own types, whoever wrote the JSON."""
    if not isinstance(said, list):
        return said
    kind, content = said
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(element, opaque) for element in content)
    if kind in MAPPINGS:
        return MAPPINGS[kind]({decode(key, opaque): decode(element, opaque) for key, element in content})
    if kind in TEXTS:
        return TEXTS[kind](content)
    if kind == "complex":
        return complex(*content)
    if kind == "range":
        return range(*content)
    if kind == "iterator":
        return iter([decode(element, opaque) for element in content])
    return opaque(content)


class Line:
    """JSON there and back, a line each, over two file descriptors."""

    def __init__(self, read, write):
        self.read, self.write = os.fdopen(read, "rb"), os.fdopen(write, "wb")

    def send(self, message):
        self.write.write(json.dumps(message).encode() + b"\n")
        self.write.flush()

    def receive(self):
        """Return the next message; None at the end."""
        line = self.read.readline()
        return json.loads(line) if line.endswith(b"\n") else None


# -- the program's side -----------------------------------------------------------------------------------------------


def serve(program, line):
    """Answer what the judge asks of a program: look a name up, call, read or set an attribute."""
    kept = []

    def opaque(value):
        kept.append(value)
        return ["object", len(kept) - 1]

    def look(name):
        found = made.__dict__[name]
        return ["module", found.__name__] if isinstance(found, types.ModuleType) else encode(found, opaque)

    def call(number, positional, named):
        arguments, named = [decode(a, kept.__getitem__) for a in positional], decode(named, kept.__getitem__)
        value = encode(kept[number](*arguments, **named), opaque)
        after = [encode(a, opaque) if isinstance(a, (list, dict, set)) else None for a in arguments]
        return [value, [new if new != old else None for old, new in zip(positional, after, strict=True)]]

    asked = {
        "look": look,
        "call": call,
        "get": lambda number, name: encode(getattr(kept[number], name), opaque),
        "set": lambda number, name, value: setattr(kept[number], name, decode(value, kept.__getitem__)),
    }
    made: Any = None
    question = ["start"]
    while question is not None:
        try:
            if made is None:
                made, answer = module("solution", program), None
            else:
                answer = asked[question[0]](*question[1:])
            line.send(["value", answer])
        except Exception as error:
            line.send(["error", type(error).__name__, str(error)[:500]])
            if made is None:
                return
        question = line.receive()


# -- the tests' side --------------------------------------------------------------------------------------------------


class Gone(BaseException):
    """The program ended, or said something that is no answer; no `except Exception` of a test holds it."""


class Remote:
    """Something of the program's own: it can be called, and its attributes read and set. It equals only itself."""

    def __init__(self, ask, number):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments, **named):
        sent = [encode(a, refer) for a in arguments]
        value, after = self._ask("call", self._number, sent, encode(named, refer))
        for argument, new in zip(arguments, after, strict=True):
            if new is not None:
                replace(argument, decode(new, lambda number: Remote(self._ask, number)))
        return decode(value, lambda number: Remote(self._ask, number))

    def __getattr__(self, name):
        return decode(self._ask("get", self._number, name), lambda number: Remote(self._ask, number))

    def __setattr__(self, name, value):
        self._ask("set", self._number, name, encode(value, refer))


def refer(value):
    """Return what stands for a value that is not sent: the program's own thing, or nothing that it knows."""
    if isinstance(value, Remote):
        return ["object", value._number]
    raise TypeError(f"the tests give the program a {type(value).__name__}, which cannot leave their process")


def replace(argument, new):
    """Put into a container what the program's call left in it."""
    argument.clear()
    argument.extend(new) if isinstance(argument, list) else argument.update(new)


class Names(dict):
    """The tests' globals: what they define, Python's builtins, and else what the program defines."""

    def __init__(self, ask, own):
        super().__init__(__name__="tests", __builtins__=builtins)
        self.ask, self.own = ask, own

    def __missing__(self, name):
        if hasattr(builtins, name) and name not in self.own:
            raise KeyError(name)
        try:
            said = self.ask("look", name)
        except KeyError:
            raise KeyError(name) from None
        if isinstance(said, list) and said[0] == "module":
            return importlib.import_module(said[1])  # the tests' own: the program's copy may lie
        return decode(said, lambda number: Remote(self.ask, number))


def judge(tests, own, line):
    """Return {"passed", "reason"} of tests over the program at the other end."""
    calls = 0

    def ask(*question):
        nonlocal calls
        calls += question[0] == "call"
        try:
            line.send(question)
        except OSError:
            raise Gone("the program ended early") from None
        return answer()

    def answer():
        try:
            said = line.receive()
            if said is None:
                raise Gone("the program ended early")
            kind, *content = said
            if kind == "value":
                return content[0]
            name, text = map(str, content)
        except (ValueError, TypeError, RecursionError):
            raise Gone("the program answered nonsense") from None
        known: Any = getattr(builtins, name, None)
        is_error = isinstance(known, type) and issubclass(known, Exception)
        raise known(text) if is_error and known is not UnicodeDecodeError else RuntimeError(f"{name}: {text}")

    def verdict(passed, reason):
        return {"passed": passed, "reason": reason[:500]}

    try:
        answer()
    except (Exception, Gone) as error:
        return verdict(False, f"the program does not start: {said_of(error)}")
    try:
        exec(compile(tests, "<tests>", "exec"), Names(ask, own))
    except AssertionError as error:
        return verdict(False, f"wrong: {failed_line(error, tests)}")
    except (Exception, Gone) as error:
        return verdict(False, f"{said_of(error)} at: {failed_line(error, tests)}")
    return verdict(True, "") if calls else verdict(False, "the tests call nothing of the program")


def said_of(error):
    return f"{type(error).__name__}: {error}".rstrip(": ") if not isinstance(error, Gone) else str(error)


def failed_line(error, tests):
    """Return the line of the tests where an exception left them."""
    lines = dict(enumerate(tests.splitlines(), 1))
    frames = traceback.extract_tb(error.__traceback__)
    *_, number = [0, *(frame.lineno for frame in frames if frame.filename == "<tests>")]
    return lines.get(number, "?").strip()[:200]


def main():
    payload_fd, read_fd, write_fd, verdict_fd = map(int, sys.argv[1:5])
    with open(payload_fd, encoding="utf-8") as file:
        payload = json.load(file)
    enter(payload, payload["limits"])
    if payload["role"] == "script":
        sys.argv[:] = ["program"]
        module("__main__", payload["program"])
        return
    line = Line(read_fd, write_fd)
    if payload["role"] == "serve":
        serve(payload["program"], line)
        return
    found = json.dumps(judge(payload["tests"], payload["own"], line))
    with open(verdict_fd, "w") as file:
        file.write(found)


if __name__ == "__main__":
    main()
