"""Damage and forgery of files: bytes, JSON values, headers of safetensors, records of journals."""

import io
import json
import struct
import zipfile
from random import Random

import onnx
from onnx import helper

from dora_export.writers.journal import encode

NUMBERS = [0, 1, -1, 2, 7, 255, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
           10**400, 0.5, -0.0, 1e308, 5e-324, *map(float, ("nan", "inf", "-inf"))]  # fmt: skip
TEXTS = ["", ".", "..", "../secret", "/etc/passwd", "a/b", "C:x", "\0", "\n", "\x1b[5m",
         "\x1b]0;x\x07", "\u202e", "\ud800", "🦜", "x" * 300, "weight", ".weight", "model.weight",
         "(a+)+b", "(", "^.*$", "none", "true", "null", "LORA", "BF16", "F32", "I64", "cpu",
         "default", "q_proj", "0", "-1", "__metadata__", "lora_A", "model.safetensors",
         "secret"]  # fmt: skip
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}]


def damaged(data: bytes, random: Random) -> bytes:
    """Change, drop, repeat or insert some bytes."""
    content = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4, 16])):
        at = random.randrange(len(content) + 1)
        span = random.choice([1, 1, 1, 2, 4, 8, 40])
        how = random.randrange(7)
        if how == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << random.randrange(8)
        elif how == 1 and content:
            content[min(at, len(content) - 1)] = random.randrange(256)
        elif how == 2:
            del content[at : at + span]
        elif how == 3:
            content[at:at] = random.randbytes(span)
        elif how == 4:
            content[at:at] = content[at : at + span]
        elif how == 5:
            number = random.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1])
            content[at : at + 8] = struct.pack("<Q", number)[: random.choice([1, 2, 4, 8])]
        else:
            del content[at:]
    return bytes(content)


def forged(value, random: Random):
    """Return JSON-ready data with one place changed."""
    value = json.loads(json.dumps(value))
    places = [(None, None)]

    def walk(inner):
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                walk(inner[key])

    if isinstance(value, (dict, list)):
        walk(value)
    holder, key = random.choice(places[1:] or places) if random.random() < 0.98 else places[0]
    if holder is None:
        return random.choice([*OTHERS, *NUMBERS, *TEXTS])
    how = random.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[random.choice(TEXTS + [str(k) for k in holder])] = holder.pop(key)
    elif how == 2 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder[key]
    elif how == 3 and isinstance(holder[key], str):
        cut = random.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:cut] + random.choice(TEXTS) + holder[key][cut:]
    elif how == 4:
        other = random.choice(places[1:])
        holder[key] = other[0][other[1]] if other[0] is not None else None
        holder[key] = json.loads(json.dumps(holder[key]))
    elif isinstance(holder[key], bool | None):
        holder[key] = random.choice([*OTHERS, *NUMBERS, *TEXTS, True, False])
    elif isinstance(holder[key], int | float) and random.random() < 0.7:
        holder[key] = random.choice([*NUMBERS, holder[key] + 1, holder[key] - 1, holder[key] * 2])
    else:
        holder[key] = random.choice([*OTHERS, *NUMBERS, *TEXTS])
    return value


def written(value, random: Random) -> bytes:
    """Return JSON as text, sometimes with a member twice, deep nesting, or another encoding."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    how = random.randrange(40)
    if how == 0 and text.startswith("{") and len(text) > 2:
        member = text[1:-1].split(",", 1)[0]
        text = f"{{{member},{text[1:]}"
    elif how == 1:
        text = text.replace("0", "[" * 2000, 1)
    elif how == 2:
        text = "\ufeff" + text
    elif how == 3:
        text = text.replace(":", ": " * 3, 1) + " " * 9
    return text.encode("utf-16" if how == 4 else "utf-8", "surrogatepass")


def _json(data: bytes, random: Random) -> bytes:
    return written(forged(json.loads(data), random), random)


def _safetensors(data: bytes, random: Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    if random.random() < 0.15:  # damage within the data: other values, NaN, infinities
        at = random.randrange(8 + length, len(data) + 1)
        return data[:at] + random.choice([b"\xff\x7f", b"\x80\x7f", b"\0\0\0\0"]) + data[at + 2 :]
    text = written(forged(json.loads(data[8 : 8 + length]), random), random)
    said = len(text) if random.random() < 0.95 else random.choice([0, 1, length, 2**40, 2**64 - 1])
    rest = data[8 + length :]
    return struct.pack("<Q", said) + text + rest[: random.choice([len(rest), len(rest), 0, -1])]


def _zipped(data: bytes, random: Random) -> bytes:
    out = io.BytesIO()
    method = random.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", method) as made:
        names = archive.namelist()
        hit = next(n for n in names if n.endswith("data.pkl"))
        hit = hit if random.random() < 0.8 else random.choice(names)
        for name in names:
            content = archive.read(name)
            made.writestr(name, damaged(content, random) if name == hit else content)
    return out.getvalue()


def _journal(data: bytes, random: Random) -> bytes:
    records = [json.loads(line.partition(b" ")[2]) for line in data.splitlines()]
    at = random.randrange(len(records))
    records[at] = forged(records[at], random)
    return b"".join(encode(record) for record in records)


def _onnx(data: bytes, random: Random) -> bytes:
    """Forge a field of a graph: a name, a shape, a type, a place outside of the file, a node."""
    model = onnx.load_model_from_string(data)
    graph = model.graph
    tensor, node = random.choice(graph.initializer), random.choice(graph.node)
    how = random.randrange(12)
    if how == 0:
        tensor.name = _text(random)
    elif how == 1 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = _int64(random)
    elif how == 2:
        tensor.dims.append(random.choice([0, 1, 2, -1, 2**40]))
    elif how == 3:
        tensor.data_type = random.randrange(30)
    elif how == 4 and tensor.external_data:
        entry = random.choice(tensor.external_data)
        entry.value = random.choice([_text(random), str(random.choice(NUMBERS)), entry.value + "0"])
    elif how == 5:
        tensor.raw_data = damaged(tensor.raw_data, random)
    elif how == 6 and node.input:
        other = random.choice(graph.node)
        node.input[random.randrange(len(node.input))] = random.choice(
            [_text(random), *other.input, *other.output]
        )
    elif how == 7 and node.output:
        node.output[0] = random.choice([_text(random), *random.choice(graph.node).output])
    elif how == 8:
        node.op_type = random.choice(["Gemm", "Transpose", "Gather", "Identity", "If", "Conv", ""])
    elif how == 9:
        node.attribute.append(helper.make_attribute("transB", random.choice([0, 1, 7, -1])))
    elif how == 10:
        graph.initializer.append(random.choice(graph.initializer))
    else:
        graph.input[0].name = random.choice([_text(random), tensor.name])
    return model.SerializeToString()


def _text(random: Random) -> str:
    return random.choice(TEXTS).encode("utf-8", "replace").decode()


def _int64(random: Random) -> int:
    return random.choice([n for n in NUMBERS if isinstance(n, int) and -(2**63) <= n < 2**63])


def mutated(name: str, data: bytes, random: Random) -> bytes:
    """Return a file's content, changed in a way that fits its kind, or anyhow."""
    makers = {
        ".json": _json, ".safetensors": _safetensors, ".bin": _zipped, ".pt": _zipped,
        ".dora_export-staging": _journal, ".onnx": _onnx,
    }  # fmt: skip
    maker = next((m for suffix, m in makers.items() if name.endswith(suffix)), damaged)
    if random.random() < 0.2:
        maker = damaged
    try:
        return maker(data, random)
    except Exception:
        return damaged(data, random)  # of another kind than its name says
