"""What one compiled kernel needs of a multiprocessor, read from the cubin itself.

A cubin is an ELF file. `cuobjdump` and the driver report the same numbers, but a machine that only
compiles has neither.
"""

import struct
from dataclasses import dataclass

__all__ = ["Resources", "resources_of"]

# Entries of the section `.nv.info`: how a value is stored, and which attribute it belongs to.
_FORMAT_SIZED_VALUE = 0x04
_ATTRIBUTE_FRAME_SIZE = 0x11
_ATTRIBUTE_REGISTER_COUNT = 0x2F
# From sm_90 on the first kilobyte of a block's shared memory is the system's: the cubin counts it,
# the limit that a device states does not.
_RESERVED_SECTION = ".nv.shared.reserved.0"
_RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Resources:
    """What one kernel of a cubin needs.

    Attributes:
        kernel: its name.
        registers: of one thread.
        local_bytes: memory of one thread beyond its registers: spills, and arrays indexed at run
            time. Both are slow, and a kernel here is to have neither.
        static_shared_bytes: shared memory of one block that its source declares; the launch asks
            for more.
    """

    kernel: str
    registers: int
    local_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class _Section:
    """A section's name, the section that it refers to, its place in the file and its size."""

    name: str
    link: int
    offset: int
    size: int


def _sections(cubin: bytes) -> list[_Section]:
    """The sections of a 64-bit little-endian ELF file."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a cubin: no 64-bit ELF file")
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_index = struct.unpack_from("<3H", cubin, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    headers = [struct.unpack_from("<2I4Q2I2Q", cubin, start + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    return [
        _Section(_text(cubin, names + name), link, offset, size)
        for name, _, _, _, offset, size, link, _, _, _ in headers
    ]


def _text(cubin: bytes, offset: int) -> str:
    """The string at `offset`, which ends with a zero byte."""
    return cubin[offset : cubin.index(b"\0", offset)].decode()


def _information(cubin: bytes, section: _Section) -> dict[int, dict[int, int]]:
    """Of `.nv.info`, by attribute: the value of each symbol, by the symbol's index."""
    found: dict[int, dict[int, int]] = {}
    at, end = section.offset, section.offset + section.size
    while at < end:
        kind, attribute, size = struct.unpack_from("<2BH", cubin, at)
        at += 4
        if kind != _FORMAT_SIZED_VALUE:
            continue  # the value stood in the place of the size
        if size == 8:
            symbol, value = struct.unpack_from("<2I", cubin, at)
            found.setdefault(attribute, {})[symbol] = value
        at += size
    return found


def resources_of(cubin: bytes) -> Resources:
    """What the only kernel of a cubin needs.

    Raises:
        ValueError: if this is not a cubin of exactly one kernel.
    """
    try:
        sections = {section.name: section for section in _sections(cubin)}
        symbols = sections[".symtab"]
        information = _information(cubin, sections[".nv.info"])
        strings = list(sections.values())[symbols.link]
        ((symbol, registers),) = information[_ATTRIBUTE_REGISTER_COUNT].items()
        (name,) = struct.unpack_from("<I", cubin, symbols.offset + symbol * 24)
        kernel = _text(cubin, strings.offset + name)
    except (KeyError, IndexError, ValueError, struct.error) as error:
        raise ValueError(f"not a cubin of one kernel: {error!r}") from error
    shared = sections.get(f".nv.shared.{kernel}")
    shared_bytes = 0 if shared is None else shared.size
    if shared is not None and _RESERVED_SECTION in sections:
        shared_bytes -= _RESERVED_BYTES
    return Resources(
        kernel=kernel,
        registers=registers,
        local_bytes=information.get(_ATTRIBUTE_FRAME_SIZE, {}).get(symbol, 0),
        static_shared_bytes=shared_bytes,
    )
