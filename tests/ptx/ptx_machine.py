"""A small PTX machine in numpy: runs what Triton compiles, one CTA at a time, every register an array [threads].

Semantics follow the PTX ISA. Approximate instructions (ex2.approx, div.full, ...) give the correctly rounded float32
result, or with ``Options.worst_approx`` one that is off by the documented relative error in a random direction.
Whatever is not known raises ``Unsupported``. What a program must not do is reported as ``Fault``:

    out-of-bounds / misaligned global or shared accesses, reads of poisoned global bytes,
    a store, an address, a guard or a vote that depends on a register or a shared cell that was never written,
    data races: in shared and in global memory between warps without a barrier, in global memory between CTAs,
    lanes of one warp that talk through shared memory without any synchronisation,
    stores of different values to one cell by one instruction, divergent barriers and shuffles.

What was never written is no fault by itself: PTX leaves its value open. Lanes without a value travel through
arithmetic, comparisons, selections and shuffles. Triton's reductions between warps have such lanes: a few lanes load,
all lanes shuffle, and the lane that stores has its sum from those few.

Control flow: while all threads agree there is one pc; where a branch diverges, the threads with the smallest pc run
until everybody is at the same pc again. A barrier blocks until all threads have arrived.
"""

# ruff: noqa: E731, B008  (an instruction is a function, made where it is decoded)
from __future__ import annotations

import ctypes
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
WARP = 32


class Fault(Exception):
    """The program broke a rule of the machine."""


class NoValue(Fault):
    """An operand holds no value in some lane."""


class Unsupported(Exception):
    """An instruction or operand this machine does not know."""


@dataclass
class Options:
    races: bool = True
    stats: bool = False  # count sectors and wavefronts: ``Memory.traffic``, ``Program.waves``
    worst_approx: int | None = None  # a seed: approximate instructions err as much as the ISA document allows
    contract: bool = False  # fuse mul and add/sub without rounding modifier, as ptxas may
    limit: int = 2_000_000  # instructions per CTA


# ---------------------------------------------------------------------------------------------------- global memory


class Segment:
    """The memory that one pointer argument may touch: its own stretch of virtual addresses over real memory."""

    def __init__(self, name: str, key: int, pointer: int, nbytes: int, granule: int, storage: tuple[int, int]) -> None:
        self.name, self.nbytes = name, nbytes
        self.base = (key << 40) + (1 << 20) + pointer % 4096
        self.real = pointer
        raw = (ctypes.c_uint8 * max(nbytes, 1)).from_address(pointer) if nbytes else bytearray(1)
        self.bytes = np.frombuffer(raw, u8)
        self.bytes.flags.writeable = True
        self.views = {1: self.bytes}
        for w, t in ((2, u16), (4, u32), (8, u64)):
            if pointer % w == 0:
                self.views[w] = self.bytes[: nbytes // w * w].view(t)
        self.granule, self.storage = granule, storage
        self.shadow_shift = (pointer - storage[0]) // granule
        self.poison: np.ndarray | None = None  # bool per byte: never written


class Shadow:
    """The accesses since the last barrier, and the CTA of each in this launch; per granule of a storage."""

    def __init__(self, cells: int) -> None:
        self.epoch = np.zeros(cells, i32)
        self.wm, self.rm = np.zeros(cells, u32), np.zeros(cells, u32)
        self.wcta, self.rcta = np.full(cells, -1, i32), np.full(cells, -1, i32)


class Memory:
    """The global memory of one launch."""

    def __init__(self, options: Options) -> None:
        self.segments: dict[int, Segment] = {}
        self.shadows: dict[tuple[int, int], Shadow] = {}
        self.options = options
        self.epoch = 0
        self.benign = 0
        self.traffic: dict[str, list[int]] = {}  # of each argument: [warps' accesses, sectors, least sectors]

    def add(self, name: str, pointer: int, nbytes: int, granule: int, storage: tuple[int, int]) -> Segment:
        key = len(self.segments) + 1
        segment = Segment(name, key, pointer, nbytes, granule, storage)
        self.segments[key] = segment
        if self.options.races and (storage[0], granule) not in self.shadows:
            self.shadows[storage[0], granule] = Shadow(storage[1] // granule + 16)
        return segment

    def resolve(self, a: np.ndarray, size: int, kind: str) -> list[tuple[Segment, np.ndarray, np.ndarray | None]]:
        """[(segment, offsets, which of the addresses)]; checks bounds and alignment."""
        if (a & u64(size - 1)).any():
            raise Fault(f"misaligned {kind} of {size} bytes: {a[(a & u64(size - 1)) != 0][:4]}")
        keys = a >> u64(40)
        first = int(keys[0])
        parts = [(first, None)] if (keys == keys[0]).all() else [(int(k), keys == k) for k in np.unique(keys)]
        out = []
        for key, which in parts:
            segment = self.segments.get(key)
            if segment is None:
                raise Fault(f"{kind} at a wild address {int(a[0]):#x}")
            off = (a if which is None else a[which]).view(i64) - segment.base
            bad = (off < 0) | (off + size > segment.nbytes)
            if bad.any():
                raise Fault(
                    f"out-of-bounds {kind} of {size} bytes in {segment.name} ({segment.nbytes} bytes): offsets "
                    f"{off[bad][:6].tolist()}, {int(bad.sum())} threads"
                )
            out.append((segment, off, which))
        return out

    def races(self, segment: Segment, off: np.ndarray, size: int, warps: np.ndarray, cta: int, values) -> None:
        """Checks and records an access; ``values`` (bytes [k, size]) for a store, None for a load."""
        g = segment.granule
        shadow = self.shadows[segment.storage[0], g]
        n = max(size // g, 1)
        first = off // g + segment.shadow_shift
        cells = first if n == 1 else (first[:, None] + np.arange(n)).ravel()
        bits = (u32(1) << warps.astype(u32)) if n == 1 else np.repeat(u32(1) << warps.astype(u32), n)
        stale = shadow.epoch[cells] != self.epoch
        if stale.any():
            z = cells[stale]
            shadow.wm[z] = 0
            shadow.rm[z] = 0
            shadow.epoch[z] = self.epoch
        wm, rm = shadow.wm[cells], shadow.rm[cells]
        wcta, rcta = shadow.wcta[cells], shadow.rcta[cells]
        other_w = (wm & ~bits) != 0
        foreign_w = (wcta != -1) & (wcta != cta)
        if values is None:
            if other_w.any():
                raise Fault(f"race in {segment.name}: read of what another warp wrote without a barrier")
            if foreign_w.any():
                raise Fault(f"race in {segment.name}: CTA {cta} reads what CTA {wcta[foreign_w][0]} wrote")
            shadow.rcta[cells] = np.where((rcta == -1) | (rcta == cta), cta, -2)
        else:
            if ((rm & ~bits) != 0).any():
                raise Fault(f"race in {segment.name}: write of what another warp read without a barrier")
            if ((rcta != -1) & (rcta != cta)).any():
                raise Fault(f"race in {segment.name}: CTA {cta} writes what another CTA reads in this launch")
            if other_w.any() or foreign_w.any():
                now = segment.bytes[off[:, None] + np.arange(size)]
                if (now != values).any():
                    raise Fault(f"race in {segment.name}: two writes of different values without a barrier")
                self.benign += 1
            shadow.wcta[cells] = cta
        mask = shadow.rm if values is None else shadow.wm
        if warps[0] == warps[-1]:  # ascending
            mask[cells] |= bits[0]
        else:
            for w in range(int(warps[0]), int(warps[-1]) + 1):
                bit = u32(1) << u32(w)
                mask[cells[bits == bit]] |= bit

    def account(self, segment: Segment, off: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Counts the sectors, of 32 bytes, that each warp touches, and how many its bytes would fill."""
        entry = self.traffic.setdefault(segment.name, [0, 0, 0])
        a = off + segment.base
        for w in np.unique(warps):
            mine = np.unique(a[warps == w])
            entry[0] += 1
            entry[1] += np.unique(mine >> 5).size
            entry[2] += -(-mine.size * size // 32)


# ---------------------------------------------------------------------------------------------------- arithmetic


def fma32(a, b, c):
    """a b + c in float32, rounded once."""
    a, b, c = np.asarray(a, f32), np.asarray(b, f32), np.asarray(c, f32)
    p = a.astype(f64) * b.astype(f64)  # exact
    c = c.astype(f64)
    s = p + c
    bits = s.view(i64)
    risky = ((bits & 0x1FFFFFFF) == 0x10000000) | ((np.abs(s) < 1.2e-38) & (s != 0))
    if np.count_nonzero(risky):  # round to odd in float64, so that the second rounding is the only one
        bb = s - p
        err = (p - (s - bb)) + (c - bb)
        fix = (err != 0) & np.isfinite(s) & ((bits & 1) == 0)
        if fix.any():
            up = (err > 0) == (s > 0)
            s = (bits + np.where(fix, np.where(up, 1, -1), 0)).view(f64)
    return s.astype(f32)


def ftz(x):
    tiny = (np.abs(x) < f32(1.17549435e-38)) & (x != 0)
    return np.where(tiny, np.copysign(f32(0), x), x).astype(f32) if np.count_nonzero(tiny) else x


def fmax(a, b, nan=False):
    a, b = np.asarray(a, f32), np.asarray(b, f32)
    r = np.maximum(a, b) if nan else np.fmax(a, b)
    if np.count_nonzero(r == 0):  # +0 > -0
        r = np.where((a == 0) & (b == 0), (a.view(u32) & b.view(u32)).view(f32), r)
    return r


def fmin(a, b, nan=False):
    a, b = np.asarray(a, f32), np.asarray(b, f32)
    r = np.minimum(a, b) if nan else np.fmin(a, b)
    if np.count_nonzero(r == 0):
        r = np.where((a == 0) & (b == 0), (a.view(u32) | b.view(u32)).view(f32), r)
    return r


def bf16_to_f32(x):
    return (np.asarray(x, u16).astype(u32) << u32(16)).view(f32)


def f32_to_bf16(x):
    """Round to nearest even, as uint16."""
    x = np.asarray(x, f32)
    b = x.view(u32)
    r = ((b + u32(0x7FFF) + ((b >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return np.where(np.isnan(x), u16(0x7FFF), r)


def f16_to_f32(x):
    return np.asarray(x, u16).view(f16).astype(f32)


def f32_to_f16(x):
    return np.asarray(x, f32).astype(f16).view(u16)


def prmt(a, b, sel):
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    out = u32(0)
    for k in range(4):
        nibble = (sel >> u32(4 * k)) & u32(15)
        byte = ((both >> ((nibble & u32(7)).astype(u64) * u64(8))) & u64(255)).astype(u32)
        signs = np.where((byte & u32(128)) != 0, u32(255), u32(0))
        out = out | (np.where((nibble & u32(8)) != 0, signs, byte).astype(u32) << u32(8 * k))
    return out


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
TYPES = {
    "u8": u8, "s8": i8, "b8": u8, "u16": u16, "s16": i16, "b16": u16, "u32": u32, "s32": i32, "b32": u32,
    "u64": u64, "s64": i64, "b64": u64, "f32": f32, "f64": f64, "f16": u16, "bf16": u16, "f16x2": u32, "bf16x2": u32,
    "f32x2": u64, "pred": np.bool_,
}  # fmt: skip
WIDTH = {name: np.dtype(t).itemsize for name, t in TYPES.items()}
STORAGE = {1: u16, 2: u16, 4: u32, 8: u64}
REGISTER = {"p": np.bool_, "rs": u16, "r": u32, "rd": u64, "h": u16, "hh": u32, "f": u32, "fd": u64}


def compare(op, a, b, kind):
    if kind not in ("f32", "f64"):
        return COMPARE[op](a, b)
    if op == "num":
        return ~(np.isnan(a) | np.isnan(b))
    if op == "nan":
        return np.isnan(a) | np.isnan(b)
    if op == "ne":
        return np.not_equal(a, b) & ~(np.isnan(a) | np.isnan(b))
    if op in COMPARE:
        return COMPARE[op](a, b)  # numpy's are ordered, but for !=
    if op.endswith("u") and op[:-1] in COMPARE:
        return COMPARE[op[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    raise Unsupported(f"comparison {op}.{kind}")


# ---------------------------------------------------------------------------------------------------- programs


@dataclass(slots=True)
class Instruction:
    text: str
    line: int
    op: str
    run: object = None
    kind: int = 0  # 0 ordinary, 1 branch, 2 barrier, 3 return, 4 warp barrier
    guard: int = -1
    negate: bool = False
    target: int = -1
    writes: list = field(default_factory=list)


class Program:
    """Parsed PTX, bound to one register file; ``run`` executes a grid."""

    def __init__(self, ptx: str, shared: int, threads: int, options: Options | None = None) -> None:
        self.options = options or Options()
        self.T, self.shared_bytes = threads, shared
        self.registers: dict[str, int] = {}
        self.kinds: list[type] = []
        self.R: list = []
        self.U: dict[int, np.ndarray] = {}  # registers that some lanes have not got a value in
        self.lenient = False  # while an instruction runs whose lanes without a value are accounted for
        self.lanes = np.arange(threads)
        self.warp_of = self.lanes // WARP
        self.symbols: dict[str, int] = {}
        self.code: list[Instruction] = []
        self.used_mask = None
        self.hazards: Counter = Counter()
        self._parse(ptx)
        self.counts = np.zeros(len(self.code))
        self.waves = [0, 0]  # wavefronts of shared accesses, and the least for their words

    # -- parsing

    def _parse(self, ptx: str) -> None:
        entry = re.search(r"\.visible \.entry\s+(\w+)\s*\((.*?)\)", ptx, re.S)
        assert entry is not None
        self.name = entry.group(1)
        self.params = {}
        for k, p in enumerate(x for x in entry.group(2).split(",") if x.strip()):
            found = re.search(r"\.param\s+\.(\w+)\b.*?(\w+)\s*$", p.strip(), re.S)
            assert found is not None, p
            self.params[found.group(2)] = (k, found.group(1))
        need = re.search(r"\.reqntid\s+(\d+)", ptx)
        if need and int(need.group(1)) != self.T:
            raise Fault(f"kernel wants {need.group(1)} threads, launched with {self.T}")
        for m in re.finditer(r"\.extern \.shared .*?\.b8 (\w+)\[\]", ptx):
            self.symbols[m.group(1)] = 0
        body = ptx[entry.end() :]
        start = body.index("{")
        first_line = ptx[: entry.end() + start].count("\n") + 1
        depth, end = 0, len(body)
        for k in range(start, len(body)):
            depth += (body[k] == "{") - (body[k] == "}")
            if depth == 0:
                end = k
                break
        labels: dict[str, int] = {}
        pending: list[tuple[Instruction, str]] = []
        pragma = None
        for n, raw in enumerate(body[start + 1 : end].split("\n")):
            text = re.sub(r"//.*", "", raw).strip()
            if not text or text.startswith((".reg", ".loc", ".file")):
                continue
            label = re.match(r"(\$?[\w$]+):\s*(.*)$", text)
            if label and not text.startswith("%"):
                labels[label.group(1)] = len(self.code)
                text = label.group(2)
                if not text:
                    continue
            if text.startswith(".pragma"):
                found = re.search(r"used_bytes_mask (0x[0-9a-fA-F]+)", text)
                if found:
                    pragma = int(found.group(1), 16)
                elif "nounroll" not in text:
                    raise Unsupported(text)
                continue
            for piece in text.split(";"):
                piece = piece.strip()
                if not piece or piece.startswith((".reg", ".loc")):
                    continue
                if piece in "{}":
                    continue
                ins = self._instruction(piece, first_line + n, pragma)
                pragma = None
                if ins.kind == 1:
                    pending.append((ins, piece.split()[-1]))
                self.code.append(ins)
            if not raw.rstrip().endswith((";", ":", "}", "{")) and "//" not in raw:
                raise Unsupported(f"statement over several lines: {raw}")
        for ins, label_name in pending:
            ins.target = labels[label_name]
        if self.options.contract:
            self._contract()

    def _register(self, name: str) -> int:
        if name not in self.registers:
            prefix = re.match(r"%([a-z]+)", name)
            if prefix is None or prefix.group(1) not in REGISTER:
                raise Unsupported(f"register {name}")
            self.registers[name] = len(self.R)
            self.kinds.append(REGISTER[prefix.group(1)])
            self.R.append(None)
        return self.registers[name]

    def get(self, token: str, kind: str):
        """A reader of an operand: called with the mask of lanes, gives an array (or numpy scalar) of ``kind``."""
        token = token.strip()
        t = TYPES[kind]
        negate = token.startswith("!")
        token = token.lstrip("!")
        if re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid", token):
            return lambda m: self.special[token].view(t) if np.dtype(t).itemsize == 4 else self.special[token].astype(t)
        if token.startswith("%"):
            i = self._register(token)
            R, U, own = self.R, self.U, self.kinds[self._register(token)]
            if np.dtype(own).itemsize == np.dtype(t).itemsize:
                same = own is t

                def read(m):
                    v = R[i]
                    if v is None or (U and i in U):
                        v = self._checked(i, token, m)
                    return (~v if negate else v) if same else v.view(t)

                return read
            if np.dtype(own).itemsize < np.dtype(t).itemsize:
                raise Unsupported(f"{token} read as {kind}")
            unsigned = STORAGE[np.dtype(t).itemsize] if np.dtype(t).itemsize > 1 else u8

            def narrow(m):
                v = R[i]
                if v is None or (U and i in U):
                    v = self._checked(i, token, m)
                return v.astype(unsigned).view(t)

            return narrow
        if token in self.symbols:
            address = u32(self.symbols[token]) if WIDTH[kind] == 4 else u64(self.symbols[token])
            return lambda m: address
        value = self.immediate(token, t)
        return lambda m: value

    @staticmethod
    def immediate(token: str, t):
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", token):
            bits = u32(int(token[2:], 16))
            return bits.view(t) if np.dtype(t).itemsize == 4 else t(bits.view(f32))
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", token):
            return u64(int(token[2:], 16)).view(t)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", token):
            size = np.dtype(t).itemsize
            number = int(token.rstrip("U"), 0) & ((1 << (8 * size)) - 1)
            if t is np.bool_:
                return np.bool_(number)
            return {1: u8, 2: u16, 4: u32, 8: u64}[size](number).view(t)
        raise Unsupported(f"operand {token}")

    def put(self, token: str, ins: Instruction | None = None):
        """A writer of a register: called with an array of the register's width and the mask."""
        token = token.strip()
        if token == "_":
            return lambda v, m: None
        i = self._register(token)
        R, U, own, T = self.R, self.U, self.kinds[self._register(token)], self.T
        if ins is not None:
            ins.writes.append(token)

        def write(v, m):
            if v.dtype != own:
                v = v.view(own) if v.dtype.itemsize == np.dtype(own).itemsize else v.astype(own)
            if not v.shape:
                v = np.full(T, v)
            if m is None:
                R[i] = v
                if U and i in U:
                    del U[i]
            else:
                old = R[i]
                if old is None:
                    U[i] = self._wide(i, ~m)
                    R[i] = np.where(m, v, np.zeros(T, own))
                else:
                    if U and i in U:
                        left = U[i] & self._wide(i, ~m)
                        if left.any():
                            U[i] = left
                        else:
                            del U[i]
                    R[i] = np.where(m, v, old)

        return write

    # Registers without a value: U holds, per register, the lanes that have none; of 64-bit registers, per half, because
    # where packed float32 arithmetic has one number only the compiler fills the other half with anything. R has None
    # for a register that no lane ever wrote.

    def _wide(self, i: int, which: np.ndarray) -> np.ndarray:
        return np.repeat(which[:, None], 2, 1) if self.kinds[i] is u64 and which.ndim == 1 else which

    def _checked(self, i: int, token: str, m) -> np.ndarray:
        """The register's content; a fault where a lane of m has none, unless such lanes are accounted for."""
        v = self.R[i]
        if not self.lenient:
            lanes = None if v is None else self.U[i] if self.U[i].ndim == 1 else self.U[i].any(1)
            if lanes is None or (lanes if m is None else lanes & m).any():
                raise NoValue(f"use of {token}, which holds no value")
        return self._content(token) if v is None else v

    def _travels(self, ins: Instruction, holes) -> None:
        """Lets lanes without a value through an instruction that only computes: its results have none there.

        ``holes()`` gives those lanes of the results ([T], or [T, 2] by halves). It is asked before anything is written.
        """
        strict = ins.run

        def run(m):
            try:
                strict(m)
            except NoValue:
                self.lenient = True
                try:
                    lanes = holes()
                    strict(m)
                finally:
                    self.lenient = False
                for token in ins.writes:
                    self.poison_register(token, self._narrowed(token, lanes, m))

        ins.run = run

    def _narrowed(self, token: str, lanes: np.ndarray, m) -> np.ndarray:
        """Lanes as the register's width has them, by halves or not; of the active ones."""
        if self.kinds[self._register(token)] is not u64 and lanes.ndim == 2:
            lanes = lanes.any(1)
        return lanes if m is None else lanes & (m if lanes.ndim == 1 else m[:, None])

    def _any_hole(self, tokens: list[str], by_halves: bool = False) -> np.ndarray:
        """Lanes [T], or lanes and halves [T, 2], in which one of these operands has no value."""
        out = np.zeros((self.T, 2) if by_halves else self.T, bool)
        for hole in map(self._holes, tokens):
            if hole is not None:
                out |= hole if by_halves or hole.ndim == 1 else hole.any(1)
        return out

    def poison_register(self, token: str, which: np.ndarray) -> None:
        if not which.any():
            return
        i = self._register(token)
        which = self._wide(i, which)
        self.U[i] = self.U.get(i, np.zeros_like(which)) | which

    def _holes(self, token: str) -> np.ndarray | None:
        """Lanes (of 64-bit registers: lanes and halves) in which an operand has no value."""
        token = token.strip().lstrip("!")
        if not token.startswith("%") or token not in self.registers:
            return None
        i = self.registers[token]
        return self._wide(i, np.ones(self.T, bool)) if self.R[i] is None else self.U.get(i)

    def _content(self, token: str) -> np.ndarray:
        """A register's bits, 0 where it was never written."""
        i = self._register(token.strip())
        v = self.R[i]
        return np.zeros(self.T, self.kinds[i]) if v is None else v

    def _contract(self) -> None:
        """Fuses mul.f32 into the add.f32 or sub.f32 that uses it, where registers have one definition."""
        defs = Counter(t for ins in self.code for t in ins.writes)
        product: dict[str, tuple[str, str]] = {}
        self.contracted = 0
        for ins in self.code:
            p = ins.text.split(None, 1)
            args = [x.strip() for x in p[1].split(",")] if len(p) > 1 else []
            if p[0] == "mul.f32" and ins.guard < 0 and all(not x.startswith("%") or defs[x] <= 1 for x in args):
                product[args[0]] = (args[1], args[2])
            if p[0] in ("add.f32", "sub.f32") and ins.guard < 0 and len(args) == 3:
                d, a, b = args
                g, w = self.get, self.put(d)
                if a in product:
                    x, y, z = g(product[a][0], "f32"), g(product[a][1], "f32"), g(b, "f32")
                    sign = f32(-1 if p[0] == "sub.f32" else 1)
                    ins.run = lambda m, x=x, y=y, z=z, w=w, s=sign: w(fma32(x(m), y(m), z(m) * s), m)
                    operands = [*product[a], b]
                elif b in product:
                    x, y, z = g(product[b][0], "f32"), g(product[b][1], "f32"), g(a, "f32")
                    sign = f32(-1 if p[0] == "sub.f32" else 1)
                    ins.run = lambda m, x=x, y=y, z=z, w=w, s=sign: w(fma32(x(m) * s, y(m), z(m)), m)
                    operands = [*product[b], a]
                else:
                    continue
                self._travels(ins, lambda tokens=operands: self._any_hole(tokens))
                self.contracted += 1

    # -- instructions

    def _instruction(self, text: str, line: int, pragma: int | None) -> Instruction:
        guard, negate, rest = -1, False, text
        found = re.match(r"@(!?)(%p\d+)\s+(.*)$", text)
        if found:
            guard, negate, rest = self._register(found.group(2)), found.group(1) == "!", found.group(3)
        op, _, tail = rest.partition(" ") if "\t" not in rest.split(" ")[0] else rest.partition("\t")
        op, tail = op.strip(), tail.strip()
        ins = Instruction(text, line, op, guard=guard, negate=negate)
        try:
            self._translate(ins, op.split("."), split_operands(tail), pragma)
        except (KeyError, ValueError, IndexError, AssertionError) as error:
            raise Unsupported(f"line {line}: {text} ({error!r})") from error
        except Unsupported as error:
            raise Unsupported(f"line {line}: {text} ({error})") from None
        return ins

    def _translate(self, ins: Instruction, op: list[str], args: list[str], pragma: int | None) -> None:
        head, kind = op[0], op[-1]
        get = self.get
        if head == "bra":
            ins.kind = 1
            return
        if head in ("ret", "exit"):
            ins.kind = 3
            return
        if (head == "bar" and op[1] == "sync") or (head == "barrier" and "sync" in op):
            assert args == ["0"]
            ins.kind = 2
            return
        if op[:3] == ["bar", "warp", "sync"]:
            ins.kind = 4
            return
        if head in ("membar", "fence", "griddepcontrol", "createpolicy", "prefetch"):
            ins.run = (lambda m: None) if head != "createpolicy" else (lambda m, w=self.put(args[0]): w(u64(0), m))
            return
        if head in ("ldmatrix", "stmatrix"):
            self._matrix(ins, op, args)
            return
        if head in ("ld", "st"):
            self._memory(ins, op, args, pragma)
            return
        if head == "mov":
            self._move(ins, kind, args)
            return
        if head == "setp":
            kind = op[-1]
            a, b = get(args[1], kind), get(args[2], kind)
            flush = "ftz" in op
            extra = op[2] if op[2] in ("and", "or", "xor") else None
            third = get(args[3], "pred") if extra else None
            outs = [self.put(x, ins) for x in args[0].split("|")]
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}

            def setp(m):
                x, y = a(m), b(m)
                if flush:
                    x, y = ftz(x), ftz(y)
                r = np.asarray(compare(op[1], x, y, kind))
                for k, w in enumerate(outs):
                    value = ~r if k else r
                    w(combine[extra](value, third(m)) if extra else value, m)

            ins.run = setp
            self._travels(ins, lambda: self._any_hole(args[1:]))
            return
        if head == "selp":
            base = kind.replace("f32", "b32").replace("f64", "b64").replace("f16", "b16")
            p, w = get(args[3], "pred"), self.put(args[0], ins)
            a, b = get(args[1], base), get(args[2], base)
            ins.run = lambda m: w(np.where(p(m), a(m), b(m)), m)

            pairs = WIDTH[base] == 8

            def of_the_chosen():
                q, none = p(None), self._any_hole(args[3:])
                q, none = (q[:, None], none[:, None]) if pairs else (q, none)
                return np.where(q, self._any_hole(args[1:2], pairs), self._any_hole(args[2:3], pairs)) | none

            self._travels(ins, of_the_chosen)
            return
        if head == "cvt":
            self._convert(ins, op, args)
            return
        if head == "shfl":
            self._shuffle(ins, op, args)
            return
        if head == "redux":
            self._redux(ins, op, args)
            return
        if head == "vote":
            self._vote(ins, op, args)
            return
        if head == "atom" or head == "red":
            raise Unsupported("atomics")
        function, sources = arithmetic(op, self.options, len(args) - 1)
        w = self.put(args[0], ins)
        assert len(args) - 1 == len(sources), (args, sources)
        readers = [get(x, s) for x, s in zip(args[1:], sources, strict=False)]
        if len(readers) == 1:
            (a,) = readers
            ins.run = lambda m: w(np.asarray(function(a(m))), m)
        elif len(readers) == 2:
            a, b = readers
            ins.run = lambda m: w(np.asarray(function(a(m), b(m))), m)
        elif len(readers) == 3:
            a, b, c = readers
            ins.run = lambda m: w(np.asarray(function(a(m), b(m), c(m))), m)
        else:
            ins.run = lambda m: w(np.asarray(function(*(r(m) for r in readers))), m)
        self._travels(ins, lambda: self._any_hole(args[1:], by_halves=kind == "f32x2"))

    def _move(self, ins: Instruction, kind: str, args: list[str]) -> None:
        kind = "pred" if kind == "pred" else f"b{8 * WIDTH[kind]}"
        if args[0].startswith("{"):
            outs = split_operands(args[0][1:-1])
            each = WIDTH[kind] // len(outs)
            a, writers = self.get(args[1], kind), [self.put(x, ins) for x in outs]
            t, source = STORAGE[each], TYPES[kind]

            def unpack(m):
                hole = self._holes(args[1])
                v = a(m) if hole is None else self._content(args[1])
                for k, w in enumerate(writers):
                    w(np.asarray(v >> source(8 * each * k)).astype(t), m)
                    if hole is not None and outs[k] != "_":
                        mine = (hole[:, k] if hole.ndim == 2 else hole) & (True if m is None else m)
                        if mine.any():
                            self.poison_register(outs[k], mine)

            ins.run = unpack
        elif args[1].startswith("{"):
            ins_ = split_operands(args[1][1:-1])
            each = WIDTH[kind] // len(ins_)
            readers, w, t = [self.get(x, f"b{8 * each}") for x in ins_], self.put(args[0], ins), TYPES[kind]

            for x in ins_:
                if x.startswith("%"):
                    self._register(x)

            def pack(m):
                v, holes = t(0), [self._holes(x) for x in ins_]
                for k, r in enumerate(readers):
                    if holes[k] is None:
                        part = np.asarray(r(m))
                    else:
                        part = self._content(ins_[k])
                    v = v | (part.astype(t) << t(8 * each * k))
                w(np.asarray(v), m)
                if any(h is not None for h in holes):
                    none = np.zeros(self.T, bool)
                    lanes = [(none if h is None else h) & (True if m is None else m) for h in holes]
                    which = np.stack(lanes, 1) if each == 4 else np.any(lanes, axis=0)
                    if which.any():
                        self.poison_register(args[0].strip(), which)

            ins.run = pack
        else:
            w, a = self.put(args[0], ins), self.get(args[1], kind)
            ins.run = lambda m: w(np.asarray(a(m)), m)
            self._travels(ins, lambda: self._any_hole(args[1:], by_halves=WIDTH[kind] == 8))

    def _convert(self, ins: Instruction, op: list[str], args: list[str]) -> None:
        modes = set(op[1:])
        kinds = [x for x in op[1:] if x in TYPES]
        w = self.put(args[0], ins)
        holes_of_sources = lambda: self._any_hole(args[1:])
        if len(args) == 3:  # packs two
            to, of = kinds
            assert of == "f32"
            assert "rn" in modes
            assert to in ("bf16x2", "f16x2")
            assert not modes & {"relu", "satfinite"}
            half = f32_to_bf16 if to == "bf16x2" else f32_to_f16
            high, low = self.get(args[1], "f32"), self.get(args[2], "f32")
            ins.run = lambda m: w((half(high(m)).astype(u32) << u32(16)) | half(low(m)).astype(u32), m)
            self._travels(ins, holes_of_sources)
            return
        to, of = kinds
        a = self.get(args[1], of)
        assert not modes & {"relu", "satfinite", "sat"}
        integer = lambda k: k[0] in "usb" and not k.startswith("bf")
        rounding = next((r for r in ("rni", "rzi", "rmi", "rpi", "rn", "rz", "rm", "rp") if r in modes), None)
        flush = "ftz" in modes
        if integer(to) and integer(of):
            function = lambda x: x.astype(TYPES[to])  # truncates, or extends by the source's sign
            if WIDTH[of] == 8 and WIDTH[to] <= 4:
                holes_of_sources = lambda: self._any_hole(args[1:], by_halves=True)[:, 0]
        elif of in ("bf16", "f16") and to == "f32":
            function = bf16_to_f32 if of == "bf16" else f16_to_f32
        elif of == "f32" and to in ("bf16", "f16") and rounding == "rn":
            function = f32_to_bf16 if to == "bf16" else f32_to_f16
        elif integer(of) and to in ("f32", "f64") and rounding in ("rn", None):
            function = lambda x: x.astype(TYPES[to])
        elif of == "f32" and to == "f32" and rounding in ("rni", "rzi", "rmi", "rpi"):
            function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
        elif of == "f32" and integer(to) and rounding in ("rni", "rzi", "rmi", "rpi"):
            around = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
            info = np.iinfo(TYPES[to])

            def function(x):
                y = np.clip(around(x.astype(f64)), float(info.min), float(info.max))
                return np.where(np.isnan(x), 0, y).astype(TYPES[to])
        elif (of, to) in (("f32", "f64"), ("f64", "f32")):
            function = lambda x: x.astype(TYPES[to])
        else:
            raise Unsupported(f"cvt {to} from {of}, {rounding}")
        own = np.dtype(self.kinds[self._register(args[0].strip())]).itemsize
        wide = {2: i16, 4: i32, 8: i64}[own] if to[0] == "s" else {2: u16, 4: u32, 8: u64}[own]

        def convert(m):
            x = a(m)
            r = np.asarray(function(ftz(x) if flush else x))
            if integer(to) and r.dtype.itemsize != own:  # a wider destination gets the sign where the type has one
                r = r.astype(wide)
            w(r.view({1: u8, 2: u16, 4: u32, 8: u64}[r.dtype.itemsize]), m)

        ins.run = convert
        self._travels(ins, holes_of_sources)

    def _lane_exchange(self, m, members) -> None:
        """Raises where a lane of the member mask is not here."""
        if (np.asarray(members)[... if m is None or not np.shape(members) else m] != 0xFFFFFFFF).any():
            raise Unsupported("a member mask that is not the whole warp")
        if m is not None:
            partial = m.reshape(-1, WARP)
            if not partial[partial.any(1)].all():
                raise Fault("a warp-wide instruction that not all lanes of the warp execute")

    def _shuffle(self, ins: Instruction, op: list[str], args: list[str]) -> None:
        mode = op[2]
        assert op[1] == "sync"
        assert op[3] == "b32"
        outs = args[0].split("|")
        w, wp = self.put(outs[0], ins), self.put(outs[1], ins) if len(outs) > 1 else None
        a, b, c = self.get(args[1], "b32"), self.get(args[2], "b32"), self.get(args[3], "b32")
        members = self.get(args[4], "b32")
        lane = (self.lanes % WARP).astype(i64)
        first = self.lanes - self.lanes % WARP

        def sources(m):
            """(lane that each lane reads from, whether it was in range), by the pseudocode of the ISA document."""
            bv, cv = np.asarray(b(m)).astype(i64) & 31, np.asarray(c(m)).astype(i64)
            seg, cval = (cv >> 8) & 31, cv & 31
            highest, lowest = (lane & seg) | (cval & ~seg & 31), lane & seg
            if mode == "up":
                j = lane - bv
                ok = j >= highest
            elif mode == "down":
                j = lane + bv
                ok = j <= highest
            elif mode == "bfly":
                j = lane ^ bv
                ok = j <= highest
            elif mode == "idx":
                j = lowest | (bv & ~seg & 31)
                ok = j <= highest
            else:
                raise Unsupported(mode)
            return first + np.where(ok, j, lane), np.broadcast_to(ok, self.T)

        fixed = None if "%" in args[2] + args[3] else sources(None)

        def shuffle(m):
            self._lane_exchange(m, members(m))
            j, ok = sources(m) if fixed is None else fixed
            hole = self._holes(args[1])
            value = np.asarray(a(m) if hole is None else self._content(args[1]))
            w(value[j] if value.shape else value, m)
            if hole is not None:  # each lane has a value where the lane that it read has one
                self.poison_register(outs[0], self._narrowed(outs[0], hole[j], m))
            if wp is not None:
                wp(ok, m)

        ins.run = shuffle

    def _redux(self, ins: Instruction, op: list[str], args: list[str]) -> None:
        what, kind = op[2], op[-1]
        w, a, members = self.put(args[0], ins), self.get(args[1], kind), self.get(args[2], "b32")
        absolute, nan = "abs" in op, "NaN" in op

        def redux(m):
            self._lane_exchange(m, members(m))
            hole = self._holes(args[1])
            value = a(m) if hole is None else self._content(args[1]).view(TYPES[kind])
            v = np.broadcast_to(value, self.T).reshape(-1, WARP)
            if kind == "f32":
                v = np.abs(v) if absolute else v
                r = v[:, 0]
                for k in range(1, WARP):
                    r = {"max": fmax, "min": fmin}[what](r, v[:, k], nan)
            else:
                reduce = {"add": np.add, "min": np.minimum, "max": np.maximum,
                          "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[what]  # fmt: skip
                r = reduce.reduce(v, axis=1).astype(v.dtype)
            w(np.repeat(r, WARP), m)
            if hole is not None:  # no lane of a warp has a value where one of them had none
                self.poison_register(
                    args[0], self._narrowed(args[0], np.repeat(hole.reshape(-1, WARP).any(1), WARP), m)
                )

        ins.run = redux

    def _vote(self, ins: Instruction, op: list[str], args: list[str]) -> None:
        what = op[2]
        w, a, members = self.put(args[0], ins), self.get(args[1], "pred"), self.get(args[2], "b32")

        def vote(m):
            self._lane_exchange(m, members(m))
            v = np.broadcast_to(a(m), self.T).reshape(-1, WARP)
            if what == "ballot":
                r = (v.astype(u64) << np.arange(WARP).astype(u64)).sum(1).astype(u32)
            else:
                r = {"any": v.any(1), "all": v.all(1), "uni": v.all(1) | ~v.any(1)}[what]
            w(np.repeat(r, WARP), m)

        ins.run = vote

    # -- memory

    def _memory(self, ins: Instruction, op: list[str], args: list[str], pragma: int | None) -> None:
        load = op[0] == "ld"
        kind = op[-1]
        known = {
            "ld",
            "st",
            "global",
            "shared",
            "shared::cta",
            "param",
            "v2",
            "v4",
            "v8",
            "relaxed",
            "weak",
            "volatile",
        }
        known |= {"ca", "cg", "cs", "cv", "wb", "wt", "nc", "L1::evict_first", "L1::evict_last", "L1::no_allocate"}
        known |= {"L1::evict_normal", "L2::cache_hint", "L2::evict_first", "L2::evict_last", "gpu", "sys", "cta"}
        if set(op[:-1]) - known:
            raise Unsupported(f"modifiers {set(op[:-1]) - known}")
        space = next(x for x in op if x in ("global", "shared", "shared::cta", "param"))
        vector = next((int(x[1:]) for x in op if x in ("v2", "v4", "v8")), 1)
        width = WIDTH[kind]
        target, address = (args[0], args[1]) if load else (args[1], args[0])
        regs = split_operands(target[1:-1]) if target.startswith("{") else [target]
        assert len(regs) == vector, (regs, vector)
        inside = address.strip()[1:-1].strip()
        if space == "param":
            index, _ = self.params[inside]
            w = self.put(regs[0], ins)
            ins.run = lambda m: w(self.arguments[index], m)
            return
        found = re.match(r"(%\w+|\w+)\s*(?:\+\s*(-?\w+))?$", inside)
        assert found is not None, inside
        offset = int(found.group(2) or "0", 0)
        width * vector
        pc = len(self.code)
        if space == "global":
            base = self.get(found.group(1), "b64")
            where = lambda m: base(m) + u64(offset & (2**64 - 1))
        else:
            base = self.get(found.group(1), "b32")
            where = lambda m: np.broadcast_to(base(m).astype(i64) + offset, self.T)
        signed = kind.startswith("s")
        t = TYPES[kind]
        if load:
            writers = [self.put(r, ins) for r in regs]
            fetch = self._load_global if space == "global" else self._load_shared
            own = [self.kinds[self._register(r)] if r != "_" else t for r in regs]

            def run_load(m):
                data, holes = fetch(pc, where(m), width, vector, m, pragma)
                for k, w in enumerate(writers):
                    v = data[:, k].view(t)
                    if own[k] is not v.dtype.type:
                        v = (
                            v.astype(own[k])
                            if not signed
                            else v.astype(np.dtype(own[k]).str.replace("u", "i")).view(own[k])
                        )
                    w(v, m)
                    if holes is not None and holes[:, k].any():
                        self.poison_register(regs[k], holes[:, k])

            ins.run = run_load
        else:
            unsigned = {1: u8, 2: u16, 4: u32, 8: u64}[width]
            readers = [self.get(r, f"b{8 * width}") for r in regs]
            store = self._store_global if space == "global" else self._store_shared

            def run_store(m):
                data = np.stack([np.broadcast_to(r(m), self.T) for r in readers], 1).astype(unsigned)
                store(pc, where(m), width, vector, data, m)

            ins.run = run_store

    def _load_global(self, pc, a, width, vector, m, pragma):
        mem, size = self.memory, width * vector
        a = np.broadcast_to(a, self.T)
        live = self.lanes if m is None else np.flatnonzero(m)
        a = a[live]
        t = {1: u8, 2: u16, 4: u32, 8: u64}[width]
        data = np.zeros((self.T, vector), t)
        warps = self.warp_of[live]
        for segment, off, which in mem.resolve(a, size, "read"):
            rows = live if which is None else live[which]
            if segment.poison is not None and segment.poison[off[:, None] + np.arange(size)].any():
                bad = off[segment.poison[off[:, None] + np.arange(size)].any(1)]
                raise Fault(f"read of {segment.name} where nothing was ever written: offsets {bad[:6].tolist()}")
            view = segment.views.get(width)
            if view is None:
                raise Fault(f"{segment.name} is not aligned to {width} bytes")
            first = off // width
            data[rows] = view[first[:, None] + np.arange(vector)]
            mine = warps if which is None else warps[which]
            if self.options.races:
                mem.races(segment, off, size, mine, self.cta, None)
            if self.options.stats:
                mem.account(segment, off, size, mine)
        return data, None

    def _store_global(self, pc, a, width, vector, data, m):
        mem, size = self.memory, width * vector
        a = np.broadcast_to(a, self.T)
        live = self.lanes if m is None else np.flatnonzero(m)
        a, data = a[live], data[live]
        warps = self.warp_of[live]
        self._same_instruction(a, data)
        for segment, off, which in mem.resolve(a, size, "write"):
            values = data if which is None else data[which]
            mine = warps if which is None else warps[which]
            if self.options.races:
                mem.races(
                    segment, off, size, mine, self.cta, np.ascontiguousarray(values).view(u8).reshape(len(off), -1)
                )
            view = segment.views.get(width)
            if view is None:
                raise Fault(f"{segment.name} is not aligned to {width} bytes")
            view[(off // width)[:, None] + np.arange(vector)] = values
            if segment.poison is not None:
                segment.poison[off[:, None] + np.arange(size)] = False
            if self.options.stats:
                mem.account(segment, off, size, mine)

    @staticmethod
    def _same_instruction(a: np.ndarray, data: np.ndarray) -> None:
        """Lanes of one instruction that store different values to one address (elements are of one size, aligned)."""
        order = np.argsort(a, kind="stable")
        s = a[order]
        twice = s[1:] == s[:-1]
        if twice.any():
            d = data[order]
            if (d[1:][twice] != d[:-1][twice]).any():
                raise Fault("one instruction stores different values to one address")

    def _matrix(self, ins: Instruction, op: list[str], args: list[str]) -> None:
        """ldmatrix and stmatrix: lanes 8k .. 8k+7 give the addresses of the rows of the k-th 8 x 8 matrix of b16."""
        load, trans = op[0] == "ldmatrix", "trans" in op
        assert set(op[1:]) - {"trans"} <= {"sync", "aligned", "m8n8", "x1", "x2", "x4", "shared", "shared::cta", "b16"}
        assert {"sync", "aligned", "m8n8", "b16"} <= set(op)
        count = next(int(x[1:]) for x in op if x in ("x1", "x2", "x4"))
        target, address = (args[0], args[1]) if load else (args[1], args[0])
        regs = split_operands(target[1:-1]) if target.startswith("{") else [target]
        assert len(regs) == count
        found = re.match(r"(%\w+|\w+)\s*(?:\+\s*(-?\w+))?$", address.strip()[1:-1].strip())
        assert found is not None
        base, offset, pc, T = self.get(found.group(1), "b32"), int(found.group(2) or "0", 0), len(self.code), self.T
        lane = self.lanes % WARP
        givers = lane < 8 * count
        # where lane t's two halves of matrix k lie: (row, column) = (t / 4, 2 (t % 4) + h), swapped by .trans
        row = (lane // 4)[:, None] + np.zeros(2, int)
        column = (2 * (lane % 4))[:, None] + np.arange(2)
        if trans:
            row, column = column, row
        warp0 = (self.lanes - lane)[:, None]
        writers = [self.put(r, ins) for r in regs] if load else []
        readers = [] if load else [self.get(r, "b32") for r in regs]

        def run(m):
            self._lane_exchange(m, 0xFFFFFFFF)
            a = np.broadcast_to(base(m).astype(i64) + offset, T)
            active = givers if m is None else givers & m
            if load:
                data, holes = self._load_shared(pc, a, 2, 8, active, None)  # [T, 8]: the row that a lane points to
                for k, w in enumerate(writers):
                    mine = warp0 + 8 * k + row
                    halves = data[mine, column].astype(u32)
                    w(halves[:, 0] | (halves[:, 1] << u32(16)), m)
                    if holes is not None and holes[mine, column].any():
                        self.poison_register(regs[k], holes[mine, column].any(1))
            else:
                data = np.zeros((T, 8), u16)
                for k, r in enumerate(readers):
                    v = np.broadcast_to(r(m), T)
                    for h in (0, 1):
                        data[(warp0 + 8 * k + row)[:, h], column[:, h]] = (v >> u32(16 * h)).astype(u16)
                self._store_shared(pc, a, 2, 8, data, active)

        ins.run = run

    def _shared_cells(self, a, size, m, kind):
        live = self.lanes if m is None else np.flatnonzero(m)
        a = a[live]
        if (a & (size - 1)).any():
            raise Fault(f"misaligned shared {kind} of {size} bytes")
        if (a < 0).any() or (a + size > self.shared_bytes).any():
            raise Fault(
                f"out-of-bounds shared {kind}: {a[(a < 0) | (a + size > self.shared_bytes)][:4]} of {self.shared_bytes}"
            )
        return live, a, a[:, None] + np.arange(size)

    def _load_shared(self, pc, a, width, vector, m, pragma):
        size = width * vector
        live, a, cells = self._shared_cells(a, size, m, "read")
        used = np.ones(size, bool) if pragma is None else np.array([(pragma >> k) & 1 for k in range(size)], bool)
        t = {1: u8, 2: u16, 4: u32, 8: u64}[width]
        data = np.zeros((self.T, vector), t)
        data[live] = self.shared[cells].view(t)
        holes = np.zeros((self.T, vector), bool)
        holes[live] = ((~self.shared_init[cells]) | ~used).reshape(len(live), vector, width).any(2)
        if self.options.races:
            c = cells[:, used]
            bits = (u32(1) << self.warp_of[live].astype(u32))[:, None]
            if ((self.sh_w[c] & ~bits) != 0).any():
                raise Fault("race in shared memory: read of what another warp wrote without a barrier")
            writer = self.sh_thread[c]
            hazard = (
                (writer >= 0)
                & (writer != live[:, None])
                & (self.sh_sync[c] == self.warp_sync[self.warp_of[live]][:, None])
            )
            if hazard.any():
                self.hazards[f"{self.code[pc].text} (line {self.code[pc].line})"] += 1
            for w in range(int(self.warp_of[live[0]]), int(self.warp_of[live[-1]]) + 1):
                self.sh_r[c[self.warp_of[live] == w]] |= u32(1) << u32(w)
        if self.options.stats:
            self._bank_conflicts(a, size, live)
        return data, holes if holes.any() else None

    def _store_shared(self, pc, a, width, vector, data, m):
        size = width * vector
        live, a, cells = self._shared_cells(a, size, m, "write")
        data = np.ascontiguousarray(data[live])
        self._same_instruction(a, data)
        raw = data.view(u8).reshape(len(live), size)
        if self.options.races:
            bits = (u32(1) << self.warp_of[live].astype(u32))[:, None]
            if ((self.sh_r[cells] & ~bits) != 0).any():
                raise Fault("race in shared memory: write of what another warp read without a barrier")
            if ((self.sh_w[cells] & ~bits) != 0).any() and (self.shared[cells] != raw).any():
                raise Fault("race in shared memory: two writes of different values without a barrier")
            for w in range(int(self.warp_of[live[0]]), int(self.warp_of[live[-1]]) + 1):
                self.sh_w[cells[self.warp_of[live] == w]] |= u32(1) << u32(w)
            self.sh_thread[cells] = live[:, None]
            self.sh_sync[cells] = self.warp_sync[self.warp_of[live]][:, None]
        self.shared[cells] = raw
        self.shared_init[cells] = True
        if self.options.stats:
            self._bank_conflicts(a, size, live)

    def _bank_conflicts(self, a, size, live) -> None:
        """Wavefronts of a shared access against the least: 32 banks of 4 bytes."""
        for w in np.unique(self.warp_of[live]):
            mine = a[self.warp_of[live] == w]
            words = np.unique((mine[:, None] + np.arange(0, max(size, 4), 4)).ravel() // 4)
            self.waves[0] += int(np.bincount(words % 32).max())
            self.waves[1] += -(-words.size // 32)

    # -- execution

    def run(self, grid: tuple[int, int, int], arguments: list, memory: Memory, order=None) -> None:
        """Runs every CTA of the grid; ``arguments`` are numpy scalars in the order of the kernel's parameters."""
        if len(arguments) != len(self.params):
            raise Fault(f"{len(self.params)} parameters, {len(arguments)} arguments")
        self.memory = memory
        kinds = [k for _, k in self.params.values()]
        self.arguments = []
        for value, kind in zip(arguments, kinds, strict=False):
            t = TYPES[kind]
            v = (
                np.asarray(value).astype(t)
                if kind[0] == "f"
                else np.asarray(int(value) & (2 ** (8 * WIDTH[kind]) - 1)).astype(
                    {1: u8, 2: u16, 4: u32, 8: u64}[WIDTH[kind]]
                )
            )
            self.arguments.append(np.full(self.T, v.view({1: u8, 2: u16, 4: u32, 8: u64}[WIDTH[kind]])))
        ctas = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        numbers = list(range(len(ctas)))
        for n in numbers if order is None else order(numbers):
            self._run_cta(n, ctas[n], grid)

    def _run_cta(self, number: int, cta, grid) -> None:
        T = self.T
        self.cta = number
        self.special = {
            "%tid.x": self.lanes.astype(u32), "%tid.y": np.zeros(T, u32), "%tid.z": np.zeros(T, u32),
            "%laneid": (self.lanes % WARP).astype(u32), "%warpid": self.warp_of.astype(u32),
            "%ntid.x": np.full(T, T, u32), "%ntid.y": np.ones(T, u32), "%ntid.z": np.ones(T, u32),
        }  # fmt: skip
        for axis, c, n in zip("xyz", cta, grid, strict=False):
            self.special[f"%ctaid.{axis}"], self.special[f"%nctaid.{axis}"] = np.full(T, c, u32), np.full(T, n, u32)
        self.R[:] = [None] * len(self.R)
        self.U.clear()
        n = self.shared_bytes
        self.shared = np.full(n, 0xCB, u8)
        self.shared_init = np.zeros(n, bool)
        self.sh_w, self.sh_r = np.zeros(n, u32), np.zeros(n, u32)
        self.sh_thread, self.sh_sync = np.full(n, -1, i32), np.zeros(n, i32)
        self.warp_sync = np.zeros(T // WARP, i32)
        self.memory.epoch += 1
        code, R, U, counts = self.code, self.R, self.U, [0.0] * len(self.code)
        pc, m, pcs, blocked = 0, None, None, None  # m: who runs (None: all); pcs: where everyone is, while they diverge
        steps = 0
        end = len(code)
        try:
            while True:
                if pcs is not None:  # choose whom to run
                    ready = ~blocked & (pcs < end)
                    if not ready.any():
                        if not blocked.any():
                            return
                        if not (blocked | (pcs >= end)).all() or (pcs >= end).any():
                            raise Fault("a barrier that some threads never reach")
                        self._barrier()
                        pcs = np.where(blocked, pcs + 1, pcs)
                        blocked[:] = False
                        continue
                    pc = int(pcs[ready].min())
                    m = ready & (pcs == pc)
                    if m.all():
                        m, pcs, blocked = None, None, None
                elif pc >= end:
                    return
                ins = code[pc]
                steps += 1
                if steps > self.options.limit:
                    raise Fault("too many instructions: an endless loop?")
                if pcs is None and ins.kind == 0 and ins.guard < 0:  # by far the most
                    counts[pc] += 1.0
                    ins.run(None)
                    pc += 1
                    continue
                counts[pc] += 1.0 if m is None else m.reshape(-1, WARP).any(1).mean()
                g = m
                if ins.guard >= 0:
                    p = R[ins.guard]
                    if p is None or (U and ins.guard in U):
                        p = self._checked(ins.guard, "a guard", m)
                    p = ~p if ins.negate else p
                    if m is not None:
                        p = p & m
                    many = np.count_nonzero(p)
                    if many == T:
                        g = None
                    elif not many:
                        if pcs is None:
                            pc += 1
                        else:
                            pcs = np.where(m, pc + 1, pcs)
                        continue
                    else:
                        g = p
                kind = ins.kind
                if kind == 0:
                    ins.run(g)
                    if pcs is None:
                        pc += 1
                    else:
                        pcs = np.where(m, pc + 1, pcs)
                elif kind == 1:
                    if pcs is None and g is None:
                        pc = ins.target
                    else:
                        if pcs is None:
                            pcs, blocked = np.full(T, pc), np.zeros(T, bool)
                        here = np.ones(T, bool) if m is None else m
                        taken = here if g is None else g
                        pcs = np.where(here, np.where(taken, ins.target, pc + 1), pcs)
                        self.diverged = getattr(self, "diverged", 0) + 1
                elif kind == 2:
                    if ins.guard >= 0:
                        raise Unsupported("a barrier under a predicate")
                    if pcs is None:
                        self._barrier()
                        pc += 1
                    else:
                        blocked = blocked | m
                elif kind == 4:
                    here = np.ones(T, bool) if g is None else g
                    self.warp_sync[here.reshape(-1, WARP).all(1)] += 1
                    if pcs is None:
                        pc += 1
                    else:
                        pcs = np.where(m, pc + 1, pcs)
                elif kind == 3:
                    if pcs is None and g is None:
                        return
                    if pcs is None:
                        pcs, blocked = np.full(T, pc), np.zeros(T, bool)
                    here = np.ones(T, bool) if m is None else m
                    gone = here if g is None else g
                    pcs = np.where(gone, end, np.where(here, pc + 1, pcs))
        except Fault as fault:
            raise Fault(f"{self.name}, CTA {cta}, PTX line {code[pc].line}: {code[pc].text}\n    {fault}") from None
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            raise Unsupported(f"{self.name}, PTX line {code[pc].line}: {code[pc].text}: {error!r}") from error
        finally:
            self.counts += counts

    def _barrier(self) -> None:
        self.memory.epoch += 1
        self.sh_w[:] = 0
        self.sh_r[:] = 0
        self.sh_thread[:] = -1


def split_operands(text: str) -> list[str]:
    """Splits at commas outside braces and brackets."""
    out, depth, start = [], 0, 0
    for k, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            out.append(text[start:k].strip())
            start = k + 1
    last = text[start:].strip()
    return [*out, last] if last else out


def arithmetic(op: list[str], options: Options, operands: int):
    """(function of arrays, kinds of its sources) of a computing instruction with so many operands."""
    head, kind = op[0], op[-1]
    flush = "ftz" in op
    allowed = {"ftz", "rn", "lo", "hi", "wide", "approx", "full", "NaN", "wrap", "clamp", kind, head}
    rounding = {"rz", "rm", "rp", "sat"} & set(op)
    if rounding:
        raise Unsupported(f"modifier {rounding}")
    t = TYPES.get(kind)
    if kind == "f32x2":
        pairs = lambda f: (
            lambda *xs: (
                np.stack(
                    [f(*(np.ascontiguousarray(x).view(u64).reshape(-1).view(f32)[k::2] for x in xs)) for k in (0, 1)], 1
                )
                .reshape(-1)
                .view(u64)
            )
        )
        f = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32}[head]
        if set(op) - allowed:
            raise Unsupported(f"modifiers {set(op) - allowed}")
        return pairs(f), ["f32x2"] * (3 if head == "fma" else 2)
    if len(op) >= 3 and op[-2] == "f32" and kind in ("bf16", "f16") and head in ("add", "sub", "fma"):
        wide = bf16_to_f32 if kind == "bf16" else f16_to_f32  # mixed precision: PTX 8.6
        if head == "fma":
            return (lambda a, b, c: fma32(wide(a), wide(b), c)), [kind, kind, "f32"]
        f = np.add if head == "add" else np.subtract
        return (lambda a, b: f(wide(a), b)), [kind, "f32"]
    if set(op) - allowed:
        raise Unsupported(f"modifiers {set(op) - allowed}")
    z = (lambda f: lambda *xs: ftz(f(*(ftz(x) for x in xs)))) if flush else (lambda f: f)
    if kind == "f32":
        nan = "NaN" in op
        if head in ("add", "sub", "mul"):
            return z({"add": np.add, "sub": np.subtract, "mul": np.multiply}[head]), ["f32"] * 2
        if head == "fma" and "rn" in op:
            return z(fma32), ["f32"] * 3
        if head in ("max", "min"):
            two = fmax if head == "max" else fmin

            def extreme(*xs):
                r = two(xs[0], xs[1], nan)
                return two(r, xs[2], nan) if len(xs) == 3 else r

            return z(extreme), ["f32"] * operands
        if head == "neg":
            return z(lambda a: (a.view(u32) ^ u32(0x80000000)).view(f32)), ["f32"]
        if head == "abs":
            return z(lambda a: (a.view(u32) & u32(0x7FFFFFFF)).view(f32)), ["f32"]
        one = {
            "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1.0 / x, "sqrt": np.sqrt,
            "rsqrt": lambda x: 1.0 / np.sqrt(x),
            "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
        }  # fmt: skip
        error = {"ex2": 2.0**-22, "rcp": 2.0**-23, "rsqrt": 2.0**-22.9, "sqrt": 2.0**-23, "tanh": 2.0**-11}
        if head in one:
            f = one[head]
            exact = "rn" in op or options.worst_approx is None
            slack = None if exact else worst(error[head], options.worst_approx)
            return z(lambda a: finish(f(np.asarray(a).astype(f64)), slack)), ["f32"]
        if head == "div":
            slack = None if "rn" in op or options.worst_approx is None else worst(2.0**-22, options.worst_approx)
            return z(lambda a, b: finish(np.asarray(a).astype(f64) / np.asarray(b).astype(f64), slack)), ["f32"] * 2
    if kind == "pred":
        if head in ("and", "or", "xor"):
            return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[head], ["pred"] * 2
        if head == "not":
            return np.logical_not, ["pred"]
    if head in ("and", "or", "xor") and kind.startswith("b"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[head], [kind] * 2
    if head == "not" and kind.startswith("b"):
        return np.bitwise_not, [kind]
    if kind[0] in "us" and kind[1:].isdigit():
        bits = 8 * WIDTH[kind]
        if head in ("add", "sub"):
            return {"add": np.add, "sub": np.subtract}[head], [kind] * 2
        if head in ("min", "max"):
            return {"min": np.minimum, "max": np.maximum}[head], [kind] * 2
        if head == "neg":
            return np.negative, [kind]
        if head == "abs":
            return np.abs, [kind]
        if head in ("mul", "mad"):
            if "wide" in op:
                w = {"u16": u32, "s16": i32, "u32": u64, "s32": i64}[kind]
                product, third = (
                    (lambda a, b: a.astype(w) * b.astype(w)),
                    {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[kind],
                )
            elif "lo" in op:
                product, third = np.multiply, kind
            elif "hi" in op and bits == 32:
                w = u64 if kind[0] == "u" else i64
                product, third = (lambda a, b: ((a.astype(w) * b.astype(w)) >> w(32)).astype(t)), kind
            else:
                raise Unsupported("mul")
            return (
                (product, [kind] * 2) if head == "mul" else ((lambda a, b, c: product(a, b) + c), [kind, kind, third])
            )
        if head in ("div", "rem") and kind[0] == "u":

            def divide(a, b):
                if (np.asarray(b) == 0).any():
                    raise Unsupported("division by zero")
                return a // b if head == "div" else a % b

            return divide, [kind] * 2
        if head == "div":
            return (
                lambda a, b: (np.sign(a) * np.sign(b) * (np.abs(a.astype(i64)) // np.abs(b.astype(i64)))).astype(t)
            ), [kind] * 2
        if head == "shr":
            most = bits - 1 if kind[0] == "s" else bits

            def shr(a, b):
                by = np.minimum(b, u32(most))
                r = np.right_shift(a, np.minimum(by, u32(bits - 1)).astype(t))
                return np.where(by >= bits, t(0), r) if kind[0] == "u" else r

            return shr, [kind, "u32"]
        if head == "bfe":
            if bits != 32:
                raise Unsupported("bfe of 64 bits")

            def bfe(a, b, c):
                a, pos, length = (
                    np.asarray(a).view(u32).astype(i64),
                    np.asarray(b & u32(255)).astype(i64),
                    np.asarray(c & u32(255)).astype(i64),
                )
                taken = np.clip(np.minimum(length, 32 - pos), 0, 32)  # bits that the field really has
                field = (i64(1) << taken) - 1
                r = (a >> np.minimum(pos, 63)) & field
                if kind == "s32":  # filled with the field's highest bit, or the register's
                    top = (a >> np.clip(pos + length - 1, 0, 31)) & 1
                    r = np.where((length > 0) & (top == 1), r | (~field & 0xFFFFFFFF), r)
                return r.astype(u32).view(t)

            return bfe, [kind, "u32", "u32"]
    if head in ("shl", "shr") and kind.startswith("b"):
        bits = 8 * WIDTH[kind]
        shift = np.left_shift if head == "shl" else np.right_shift
        return (lambda a, b: np.where(b >= bits, t(0), shift(a, np.minimum(b, u32(bits - 1)).astype(t)))), [kind, "u32"]
    if head == "prmt" and op[1] == "b32":
        return prmt, ["b32"] * 3
    if head == "lop3" and kind == "b32":

        def lop3(a, b, c, table):
            r = u32(0)
            for k in range(8):
                if (int(np.asarray(table).flat[0]) >> k) & 1:
                    r = r | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
            return r

        return lop3, ["b32"] * 4
    if head == "popc":
        return (lambda a: np.bitwise_count(a).astype(u32)), [kind]
    raise Unsupported(".".join(op))


def worst(relative: float, seed: int):
    """Multiplies by 1 +- relative, at random."""
    g = np.random.default_rng(seed)
    return lambda x: x * (1.0 + relative * g.choice([-1.0, 1.0], size=np.shape(x)))


def finish(x, slack):
    return np.asarray(x if slack is None else slack(x)).astype(f32)
