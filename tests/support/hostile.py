"""Pickles that would do something if anyone ran them, and archives that lie about themselves."""

import io
import pickle
import struct
import zipfile

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


class Reduced:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def called(name, *arguments):
    """The operations that call a function by name, as bytes to be put into a pickle."""
    module, _, function = name.rpartition(".")
    body = b"c" + module.encode() + b"\n" + function.encode() + b"\n("
    for argument in arguments:
        body += argument if isinstance(argument, bytes) else text(argument)
    return body + b"tR"


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def dictionary(**items):
    """A pickle of a dictionary, with operations given as bytes for its values."""
    body = b"\x80\x02}("
    for key, value in items.items():
        body += text(key) + value
    return body + b"u."


def archive(path, pickled, *, storages=None, compression=zipfile.ZIP_STORED, extra=()):
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for key, data in (storages or {"0": bytes(64)}).items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", "3\n")
        for name, data in extra:
            file.writestr(name, data)
    return path


def tensor(*, key="0", kind="FloatStorage", numel=16, start=0, shape=(2, 3), stride=(3, 1)):
    """The operations that make a tensor of a storage, with any numbers."""

    def number(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    persistent = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(numel)
    body = TENSOR + b"(" + persistent + b"tQ" + number(start)
    for numbers in (shape, stride):
        body += b"(" + b"".join(number(value) for value in numbers) + b"t"
    return body + b"\x89}tR"


def legacy(pickled, storages=()):
    """A file as torch.save wrote it before 1.6, around any pickle."""
    stream = io.BytesIO()
    stream.write(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    stream.write(pickle.dumps(1001, protocol=2))
    stream.write(pickle.dumps({"protocol_version": 1001, "little_endian": True}, protocol=2))
    stream.write(pickled)
    stream.write(pickle.dumps([key for key, _ in storages], protocol=2))
    for _, data in storages:
        stream.write(struct.pack("<q", len(data) // 4) + data)
    return stream.getvalue()


# Operations that touch the file whose name they are given, in as many ways as pickles know.
def attacks(canary):
    command = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w')"
    inner = called("posix.system", command)
    return {
        "os.system": inner,
        "os.system by os": called("os.system", command),
        "subprocess": called("subprocess.call", b"]" + text("touch") + b"a" + text(str(canary)) + b"a"),
        "eval": called("builtins.eval", python),
        "exec": called("builtins.exec", python),
        "python 2": called("__builtin__.eval", python),
        "open": called("builtins.open", str(canary), "w"),
        "compile": called("builtins.compile", python, "x", "exec"),
        "import": called("builtins.__import__", "antigravity"),
        "getattr": called("builtins.getattr", b"cos\nsystem\n", "__call__"),
        "getattr of what is known": called("builtins.getattr", b"ctorch\nfloat32\n", "__class__"),
        "globals": called("builtins.globals"),
        "runpy": called("runpy._run_code", python, b"}"),
        "timeit": called("timeit.timeit", python),
        "pty": called("pty.spawn", command),
        "operator": called("operator.methodcaller", "system", command),
        "functools": called("functools.partial", b"cos\nsystem\n", command),
        "codecs": called("_codecs.encode", b"cos\nsystem\n", "latin1"),
        "numpy": called("numpy.testing._private.utils.runstring", python, b"}"),
        "torch.load": called("torch.serialization.load", str(canary)),
        "torch.hub": called("torch.hub.load", str(canary)),
        "torch.jit": called("torch.jit.unsupported_tensor_ops.execWrapper", python, b"}", b"}"),
        "distributed": called("torch.distributed.rpc.internal.PythonUDF", b"cos\nsystem\n", b"(t", b"}"),
        "pathlib is only data, its arguments are not": called("pathlib.PosixPath", inner),
        "within a known function": called("collections.OrderedDict", b"]" + inner + b"a"),
        "within a tensor": TENSOR + b"(" + inner + b"K\x00(t(t\x89}tR",
        "within a persistent name": b"(" + text("storage") + inner + b"tQ",
        "persistent name in text": b"Pposix.system\n",
        "state of an object": b"cargparse\nNamespace\n)\x81}" + text("x") + inner + b"sb",
        "state of a function": b"ccollections\nOrderedDict\n}" + text("__call__") + b"cos\nsystem\n" + b"sb",
        "state of a type": b"ctorch\nfloat32\n}" + text("a") + text("b") + b"sb",
        "instance": b"(" + text(command) + b"ios\nsystem\n",
        "object": b"(cos\nsystem\n" + text(command) + b"o",
        "newobj": b"cos\nsystem\n(" + text(command) + b"t\x81",
        "newobj_ex": b"cos\nsystem\n(" + text(command) + b"t}\x92",
        "stack_global": text("os") + text("system") + b"\x93(" + text(command) + b"tR",
        "extension": b"\x82\x01",
        "named and not called": b"cos\nsystem\n",
        "dropped": inner + b"0N",
        "key of a dictionary": b"}" + inner + b"Ns",
        "dotted": b"cos\npath.os.system\n(" + text(command) + b"tR",
        "call of something that is not a function": text("os.system") + b"(" + text(command) + b"tR",
        "call of a dtype": b"ctorch\nfloat32\n(" + text(command) + b"tR",
        "call of a storage": b"ctorch\nFloatStorage\n(J\xff\xff\xff\x7ftR",
    }
