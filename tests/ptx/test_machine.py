"""The PTX machine itself: hand-written PTX, and its arithmetic against libm, torch and brute force."""

# ruff: noqa: E501  (PTX in strings)

from __future__ import annotations

import ctypes

import numpy as np
import ptx_machine as M
import pytest
import torch
from ptx_machine import Fault, Memory, Options, Program

u32, f32 = np.uint32, np.float32


def kernel(
    body: str, params: str = ".param .u64 .ptr .global .align 1 k_param_0", threads: int = 64, shared: int = 4096
) -> str:
    return f""".version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
	{params}
)
.reqntid {threads}
{{
	.reg .b32 %r<99>;
	ld.param.b64 	%rd1, [k_param_0];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
{body}
	ret;
}}
"""


def run(body, n=64, threads=64, dtype=np.uint32, options=None, fill=0):
    out = torch.from_numpy(np.full(n, fill, dtype).view(np.int32 if np.dtype(dtype).itemsize == 4 else np.int16))
    program = Program(kernel(body, threads=threads), 4096, threads, options or Options())
    memory = Memory(program.options)
    s = out.untyped_storage()
    a = memory.add("out", out.data_ptr(), s.nbytes(), 4, (s.data_ptr(), s.nbytes()))
    program.run((1, 1, 1), [a.base], memory)
    return out.numpy().view(dtype), program


def faults(body, word, **kw):
    with pytest.raises(Fault, match=word):
        run(body, **kw)


def test_the_machine_does_what_the_isa_says():
    np.seterr(all="ignore")
    g = np.random.default_rng(0)
    # fma against libm, on numbers that round badly
    libm = ctypes.CDLL("libm.so.6")
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    bits = g.integers(0, 2**32, (3, 60000), dtype=np.uint64).astype(u32).view(f32)
    near = (g.standard_normal((3, 60000)) * 2.0 ** g.integers(-70, 70, (3, 60000))).astype(f32)
    near[2] = -(near[0] * near[1]) * (1 + g.integers(-3, 4, 60000) * f32(2.0**-23))
    halves = np.stack(
        [f32(1) + g.integers(0, 2**12, 60000).astype(f32) * f32(2**-12)] * 2 + [f32(2.0) ** g.integers(-60, 0, 60000)]
    ).astype(f32)
    tiny = (g.standard_normal((3, 60000)) * 2.0 ** np.array([[-70], [-70], [-130]])).astype(f32)
    for x in (bits, near, halves, tiny):
        want = np.array([libm.fmaf(*map(float, v)) for v in x.T], f32)
        got = M.fma32(*x)
        same = (got.view(u32) == want.view(u32)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), (x[:, ~same][:, 0], got[~same][0], want[~same][0])
    x = np.concatenate([bits[0], near[0], tiny[2]])
    for half, dtype in ((M.f32_to_bf16, torch.bfloat16), (M.f32_to_f16, torch.float16)):
        want = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        ok = (half(x) == want) | np.isnan(x)
        assert ok.all()
    every = np.arange(2**16).astype(np.uint16)
    t = torch.from_numpy(every.view(np.int16))
    assert np.array_equal(M.bf16_to_f32(every), t.view(torch.bfloat16).float().numpy(), equal_nan=True)
    assert np.array_equal(M.f16_to_f32(every), t.view(torch.float16).float().numpy(), equal_nan=True)
    zero = np.array([0.0, -0.0, 0.0, -0.0], f32)
    other = np.array([-0.0, 0.0, np.nan, 3.0], f32)
    assert M.fmax(zero, other).view(u32).tolist() == [0, 0, 0, f32(3).view(u32)]
    assert M.fmin(zero, other).view(u32).tolist() == [0x80000000, 0x80000000, 0, 0x80000000]
    # prmt against the definition
    for _ in range(300):
        a, b = (int(v) for v in g.integers(0, 2**32, 2))
        sel = int(g.integers(0, 2**16))
        by = [(a >> 8 * k) & 255 for k in range(4)] + [(b >> 8 * k) & 255 for k in range(4)]
        want = 0
        for k in range(4):
            nib = (sel >> 4 * k) & 15
            v = by[nib & 7]
            want |= ((255 if v & 128 else 0) if nib & 8 else v) << 8 * k
        assert int(M.prmt(np.array([a], u32), np.array([b], u32), u32(sel))[0]) == want
    for kind, signed in (("u32", False), ("s32", True)):
        f, _ = M.arithmetic(["bfe", kind], Options(), 3)
        for _ in range(400):
            a, pos, length = int(g.integers(0, 2**32)), int(g.integers(0, 40)), int(g.integers(0, 40))
            sbit = (a >> min(pos + length - 1, 31)) & 1 if signed and length else 0
            want = sum(((a >> (pos + i)) & 1 if i < length and pos + i <= 31 else sbit) << i for i in range(32))
            got = f(np.array([a], u32).view(M.TYPES[kind]), u32(pos), u32(length))
            assert int(np.asarray(got).view(u32)[0]) == want, (kind, a, pos, length)
    # shuffles against a loop over lanes (pseudocode of the ISA document)
    for mode, b, c in [
        ("up", 1, 0),
        ("up", 16, 0),
        ("down", 5, 31),
        ("bfly", 31, 31),
        ("bfly", 3, 0x1807),
        ("idx", 7, 31),
        ("idx", 3, 0x1807),
        ("up", 3, 0x1800),
        ("down", 2, 0x1807),
    ]:
        out, _ = run(
            f"	mul.lo.s32 	%r2, %r1, 3;\n	shfl.sync.{mode}.b32 	%r3|%p1, %r2, {b}, {c}, -1;\n	selp.b32 	%r4, 1000, 0, %p1;\n	add.s32 	%r3, %r3, %r4;\n	st.global.b32 [ %rd2 + 0 ], {{ %r3 }};"
        )
        for tid in range(64):
            lane, seg, cv = tid % 32, (c >> 8) & 31, c & 31
            top, low = (lane & seg) | (cv & ~seg & 31), lane & seg
            j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~seg & 31)}[mode]
            ok = j >= top if mode == "up" else j <= top
            j = j if ok else lane
            assert out[tid] == 3 * (tid - lane + j) + 1000 * ok, (mode, b, c, tid)
    # divergence: thread t turns t times; reconverges for the store and the barrier
    loop = """	mov.b32 	%r5, 0;
	mov.b32 	%r6, 0;
$L__1:
	setp.ge.u32 	%p1, %r5, %r1;
	@%p1 bra 	$L__2;
	add.s32 	%r6, %r6, %r5;
	add.s32 	%r5, %r5, 1;
	bra.uni 	$L__1;
$L__2:
	bar.sync 	0;
	st.global.b32 [ %rd2 + 0 ], { %r6 };"""
    out, p = run(loop)
    assert out.tolist() == [t * (t - 1) // 2 for t in range(64)]
    assert p.diverged
    # ldmatrix: lane l points at row l of four 8 x 8 matrices
    body = """	shl.b32 	%r2, %r1, 4;
	mov.b32 	%r3, global_smem;
	add.s32 	%r4, %r3, %r2;
	shl.b32 	%r10, %r1, 3;
	add.s32 	%r11, %r10, 1;
	shl.b32 	%r12, %r11, 16;
	or.b32 	%r13, %r12, %r10;
	add.s32 	%r14, %r13, 131074;
	add.s32 	%r15, %r14, 131074;
	add.s32 	%r16, %r15, 131074;
	st.shared.v4.b32 	[%r4], {%r13, %r14, %r15, %r16};
	bar.warp.sync 	-1;
	ldmatrix.sync.aligned.m8n8.x4TRANS.shared.b16 {%r20, %r21, %r22, %r23}, [%r4];
	st.global.b32 [ %rd2 + 0 ], { %r2WHICH };"""
    for trans in ("", ".trans"):
        for k in range(4):
            out, _ = run(body.replace("TRANS", trans).replace("WHICH", str(k)), threads=32, n=32)
            for lane in range(32):
                cells = [(lane // 4, 2 * (lane % 4) + h) for h in (0, 1)]
                lo, hi = ((8 * (8 * k + r) + c) if not trans else (8 * (8 * k + c) + r) for r, c in cells)
                assert out[lane] == lo | hi << 16, (trans, k, lane, hex(out[lane]), lo, hi)
    # half a register without a value is fine as long as nobody uses that half
    half = "	cvt.rn.f32.u32 	%r2, %r1;\n	mov.b64 	%rd5, {{%r2, %r77}};\n	add.f32x2 	%rd6, %rd5, %rd5;\n	mov.b64 	{{%r3, %r4}}, %rd6;\n	st.global.b32 [ %rd2 + 0 ], {{ %r{k} }};"
    out, _ = run(half.format(k=3), dtype=np.float32)
    assert out.tolist() == [2.0 * t for t in range(64)]
    faults(half.format(k=4), "holds no value")
    # what must be reported
    share = "	shl.b32 	%r2, %r1, 2;\n	st.shared.b32 	[%r2], %r1;\n{bar}	xor.b32 	%r3, %r2, {x};\n	ld.shared.b32 	%r4, [%r3];\n	st.global.b32 [ %rd2 + 0 ], {{ %r4 }};"
    out, p = run(share.format(bar="	bar.sync 	0;\n", x=128))
    assert out.tolist() == [t ^ 32 for t in range(64)]
    assert not p.hazards
    faults(share.format(bar="", x=128), "race")
    _, p = run(share.format(bar="", x=4))
    assert p.hazards, "lanes of one warp without synchronisation"
    _, p = run(share.format(bar="	bar.warp.sync 	-1;\n", x=4))
    assert not p.hazards
    faults("	ld.shared.b32 	%r4, [global_smem+64];\n	st.global.b32 [ %rd2 + 0 ], { %r4 };", "holds no value")
    faults("	st.global.b32 [ %rd2 + 4 ], { %r1 };", "out-of-bounds")
    faults("	st.global.b32 [ %rd2 + 2 ], { %r1 };", "misaligned")
    faults("	st.global.b32 [ %rd1 + 0 ], { %r1 };", "different values")
    faults("	st.global.b32 [ %rd2 + 0 ], { %r7 };", "holds no value")
    faults(
        "	setp.lt.u32 	%p1, %r1, 5;\n	@%p1 mov.b32 	%r7, %r1;\n	st.global.b32 [ %rd2 + 0 ], { %r7 };",
        "holds no value",
    )
    faults(
        "	st.global.b32 [ %rd2 + 0 ], { %r1 };\n	sub.s32 	%r2, 63, %r1;\n	mad.wide.u32 	%rd3, %r2, 4, %rd1;\n	ld.global.b32 { %r3 }, [ %rd3 + 0 ];\n	st.global.b32 [ %rd2 + 0 ], { %r3 };",
        "race",
    )
    faults("	setp.lt.u32 	%p1, %r1, 5;\n	@%p1 bra 	$L__9;\n	bar.sync 	0;\n$L__9:\n", "barrier")
    with pytest.raises(M.Unsupported):
        run("	frobnicate.b32 	%r2, %r1;")


# Lanes 0 to 3 of each warp have a number in %r4, the others nothing; %p2 is lane 0.
FEW = """	and.b32 	%r2, %r1, 31;
	setp.lt.u32 	%p1, %r2, 4;
	setp.eq.u32 	%p2, %r2, 0;
	@%p1 add.s32 	%r4, %r1, 1;
"""
STORE = "	@%p2 st.global.b32 [ %rd2 + 0 ], { %r5 };"
ADD = "	shfl.sync.bfly.b32 	%r6, %r4, {distance}, 31, -1;\n	add.s32 	%r4, %r4, %r6;\n"
EVERYONE = "	st.global.b32 [ %rd2 + 0 ], { %r5 };"


def test_a_reduction_may_shuffle_lanes_without_a_value_that_its_result_does_not_depend_on():
    """As Triton 3.6 adds up warps: the lane that stores has its sum from lanes that have something."""
    out, _ = run(FEW + ADD.format(distance=2) + ADD.format(distance=1) + "	mov.b32 	%r5, %r4;\n" + STORE)
    assert out[[0, 32]].tolist() == [1 + 2 + 3 + 4, 33 + 34 + 35 + 36]
    faults(FEW + ADD.format(distance=4) + "	mov.b32 	%r5, %r4;\n" + STORE, "%r5, which holds no value")


@pytest.mark.parametrize(
    "computes",
    [
        "	add.s32 	%r5, %r4, 0;\n",
        "	mul.wide.u32 	%rd5, %r4, 1;\n	cvt.u32.u64 	%r5, %rd5;\n",
        "	cvt.rn.f32.u32 	%r5, %r4;\n",
        "	cvt.rn.bf16x2.f32 	%r5, %r4, 0f00000000;\n",
        "	mov.b32 	{%rs1, %rs2}, %r4;\n	mov.b32 	%r5, {%rs2, %rs1};\n",
        "	selp.b32 	%r5, %r4, 7, -1;\n",
        "	setp.gt.u32 	%p3, %r4, 0;\n	selp.b32 	%r5, 1, 0, %p3;\n",
        "	setp.gt.u32 	%p3, %r4, 0;\n	not.pred 	%p4, %p3;\n	selp.b32 	%r5, 1, 0, %p4;\n",
        "	shfl.sync.up.b32 	%r5, %r4, 1, 0, -1;\n",
        "	fma.rn.f32 	%r5, %r4, %r4, %r4;\n",
        "	add.s32 	%r4, %r4, 1;\n	mov.b32 	%r5, %r4;\n",
    ],
)
def test_what_was_made_of_nothing_may_lie_about_but_not_be_stored(computes: str):
    """Lane 0 has something to store; the fault is of the others alone."""
    run(FEW + computes + STORE)
    faults(FEW + computes + EVERYONE, "%r5, which holds no value")


def test_a_selection_needs_a_value_where_it_takes_one():
    out, _ = run(FEW + "	selp.b32 	%r5, %r4, 7, %p1;\n" + EVERYONE)
    assert out.tolist() == ([1, 2, 3, 4] + [7] * 28 + [33, 34, 35, 36] + [7] * 28)
    faults(FEW + "	selp.b32 	%r5, 7, %r4, %p1;\n" + EVERYONE, "%r5, which holds no value")
    faults(
        FEW + "	setp.lt.u32 	%p3, %r4, 9;\n	selp.b32 	%r5, 7, 8, %p3;\n" + EVERYONE,
        "%r5, which holds no value",
    )


@pytest.mark.parametrize(
    "uses",
    [
        "	add.s32 	%r5, %r4, 0;\n	st.shared.b32 	[global_smem], %r5;\n",
        "	and.b32 	%r5, %r4, 60;\n	st.shared.b32 	[%r5], %r1;\n",
        "	and.b32 	%r5, %r4, 60;\n	ld.shared.b32 	%r6, [%r5];\n",
        "	mad.wide.u32 	%rd3, %r4, 0, %rd1;\n	ld.global.b32 	{ %r6 }, [ %rd3 + 0 ];\n",
        "	setp.eq.u32 	%p3, %r4, 1;\n	@%p3 mov.b32 	%r6, 1;\n",
        "	setp.eq.u32 	%p3, %r4, 1;\n	@%p3 bra 	$L__8;\n$L__8:\n",
        "	setp.eq.u32 	%p3, %r4, 1;\n	vote.sync.any.pred 	%p4, %p3, -1;\n",
        "	shfl.sync.idx.b32 	%r6, %r1, %r4, 31, -1;\n",
    ],
)
def test_addresses_guards_and_votes_need_values(uses: str):
    faults(FEW + uses, "which holds no value")


@pytest.mark.parametrize("what", ["add.s32", "max.f32", "min.NaN.f32"])
def test_a_warp_has_its_reduction_if_each_of_its_lanes_has_a_value(what: str):
    """As Triton 3.6 joins 32 warps for sm_100: the first warp reads what they found, and all reduce what they have."""
    first = "	setp.lt.u32 	%p3, %r1, 32;\n	@%p3 add.s32 	%r4, %r1, 1;\n"
    reduced = f"	redux.sync.{what} 	%r5, %r4, -1;\n"
    leader = "	setp.eq.u32 	%p4, %r1, 0;\n	@%p4 st.global.b32 [ %rd2 + 0 ], { %r5 };"
    out, _ = run(first + reduced + leader)
    assert out[0] == {"add": 33 * 16, "max": 32, "min": 1}[what[:3]]
    faults(first + reduced + EVERYONE, "%r5, which holds no value")
    faults(FEW + reduced + leader, "%r5, which holds no value")


def test_the_low_half_of_a_packed_product_needs_no_high_half():
    """The compiler packs one number with nothing, and takes the low half of what the pair comes to."""
    body = "	mov.b64 	%rd3, {%r1, %r77};\n	mul.f32x2 	%rd4, %rd3, %rd3;\n"
    run(body + "	cvt.u32.u64 	%r5, %rd4;\n" + EVERYONE)
    faults(body + "	mov.b64 	{_, %r5}, %rd4;\n" + EVERYONE, "%r5, which holds no value")


def test_a_register_that_nobody_wrote_travels_too():
    nobody = "	add.f32 	%r8, %r77, %r77;\n	mov.b32 	%r5, %r8;\n"
    run(nobody)
    faults(nobody + EVERYONE, "%r5, which holds no value")


def test_contracted_sums_let_lanes_without_a_value_through():
    body = "	mul.f32 	%r8, %r4, %r4;\n	add.f32 	%r5, %r8, %r4;\n"
    options = Options(contract=True)
    _, program = run(FEW + body + STORE, options=options)
    assert program.contracted == 1
    faults(FEW + body + EVERYONE, "%r5, which holds no value", options=options)


# A warp reads 32 numbers that lie this many elements apart.
APART = "	mul.lo.s32 	%r2, %r1, {apart};\n	mad.wide.u32 	%rd3, %r2, 4, %rd1;\n	ld.global.b32 	{{ %r5 }}, [ %rd3 + 0 ];\n"


@pytest.mark.parametrize(
    ("body", "sectors", "least"),
    [
        (APART.format(apart=1), 4, 4),
        (APART.format(apart=2), 8, 4),
        (APART.format(apart=8), 32, 4),
        (APART.format(apart=0), 1, 1),  # one number for all
        ("	ld.global.b32 	{ %r5 }, [ %rd2 + 4 ];\n", 5, 4),  # from the middle of a sector on
        ("	setp.lt.u32 	%p1, %r1, 3;\n	@%p1 st.global.b32 	[ %rd2 + 0 ], { %r1 };\n", 1, 1),  # a remainder
        ("	shl.b32 	%r2, %r1, 4;\n	cvt.u64.u32 	%rd4, %r2;\n	add.s64 	%rd3, %rd1, %rd4;\n"
         "	ld.global.v4.b32 	{ %r5, %r6, %r7, %r8 }, [ %rd3 + 0 ];\n", 16, 16),
    ],
)  # fmt: skip
def test_sectors_are_counted(body: str, sectors: int, least: int):
    options = Options(stats=True)
    out = torch.zeros(512, dtype=torch.int32)
    program = Program(kernel(body, threads=32), 4096, 32, options)
    memory = Memory(options)
    pointer = out.data_ptr()
    assert pointer % 32 == 0
    segment = memory.add("out", pointer, 2048, 4, (pointer, 2048))
    program.run((1, 1, 1), [segment.base], memory)
    assert memory.traffic == {"out": [1, sectors, least]}


@pytest.mark.parametrize(("apart", "rounds"), [(1, 1), (2, 2), (4, 4), (3, 1), (0, 1)])
def test_bank_conflicts_are_counted(apart: int, rounds: int):
    body = f"	mul.lo.s32 	%r2, %r1, {4 * apart};\n	st.shared.b32 	[%r2], {1 if apart == 0 else '%r1'};\n"
    _, program = run(body, n=32, threads=32, options=Options(stats=True))
    assert program.waves == [rounds, 1]
