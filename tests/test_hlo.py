"""hlo.py: what is read off compiled programs, on texts as XLA's compilers write them and on one compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from wmss_jax import hlo, sharding


def program(body: str, more: str = "") -> str:
    """Return a module whose entry has these lines; `more` are further computations."""
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return f"HloModule m, is_scheduled=true\n\n{more}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{lines}\n}}\n"


def only(body: str, more: str = "") -> hlo.Collective:
    (found,) = hlo.collectives(program(body, more))
    return found


# -- kinds and bytes ----------------------------------------------------------------------------------------------

GROUPS = "channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true"
KINDS = {
    "all-gather": (f"%a = bf16[32,128]{{1,0}} all-gather(%x), {GROUPS}, dimensions={{0}}", 8192, 8192 * 3 / 4),
    "all-reduce": (f"%a = f32[32,128]{{1,0:T(8,128)S(1)}} all-reduce(%x), {GROUPS}, to_apply=%sum", 16384, 24576),
    "reduce-scatter": (f"%a = f32[8,128]{{1,0}} reduce-scatter(%x), {GROUPS}, to_apply=%sum", 16384, 12288),
    "all-to-all": (f"%a = bf16[4,256,64]{{1,2,0:T(8,128)(2,1)}} all-to-all(%x), {GROUPS}", 131072, 98304),
    "collective-permute": (
        "%a = f32[8,128]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,2},{2,4}}", 4096, 4096
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_with_bytes_and_what_a_device_sends(kind):
    line, size, sent = KINDS[kind]
    found = only(f"%x = f32[8]{{0}} parameter(0)\nROOT {line}")
    assert (found.kind, found.bytes, found.sent, found.times, found.depth) == (kind, size, sent, 1, 0)


def test_a_tuple_is_sent_as_a_whole():
    found = only(f"%a = (f32[256]{{0:T(256)S(1)}}, bf16[4,8]{{1,0}}, f32[]) all-reduce(%x, %y, %z), {GROUPS}")
    assert (found.bytes, found.shapes) == (1024 + 64 + 4, ((256,), (4, 8), ()))


STARTS = {
    "one array": ("(bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%x)", "all-gather", 8192),
    "many": (
        "((f32[128]{0}, bf16[8,4]{1,0}, /*index=5*/bf16[2]{0}), (f32[512]{0}, bf16[32,4]{1,0}, /*index=5*/bf16[8]{0}))"
        " all-gather-start(%x, %y, /*index=5*/%z)", "all-gather", 2048 + 256 + 16,
    ),
    "scattered": (
        "((f32[256,4]{1,0}, f32[256]{0}), (f32[64,4]{1,0}, f32[64]{0})) reduce-scatter-start(%x, %y)",
        "reduce-scatter", 4096 + 1024,
    ),
    "traded": ("((bf16[2,256]{1,0}), bf16[2,256]{1,0}) all-to-all-start(%x)", "all-to-all", 1024),
    "reduced, both sides": ("((f32[536]{0}), f32[536]{0}) all-reduce-start(%x)", "all-reduce", 2144),
    "reduced, one side": ("(f32[4]{0}, f32[8]{0}) all-reduce-start(%x, %y)", "all-reduce", 48),
    "reduced, one array": ("f32[4]{0} all-reduce-start(%x)", "all-reduce", 16),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_what_is_started_is_counted_once_and_by_what_goes_over_the_wire(name):
    text, kind, size = STARTS[name]
    shape = text.split(" all-")[0].split(" reduce-")[0]
    done = f"%d = {shape} {kind}-done(%a)"
    found = only(f"%a = {text}, {GROUPS}, dimensions={{0}}\n{done}")
    assert (found.kind, found.bytes) == (kind, size)


def test_a_permute_that_is_started_has_flags_besides():
    found = only(
        """%a = (bf16[1,256]{1,0}, bf16[1,256]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
        %b = bf16[1,256]{1,0} collective-permute-done(%a)"""  # noqa: E501
    )
    assert (found.kind, found.bytes, found.members) == ("collective-permute", 512, (0, 1))


def test_a_wrapped_asynchronous_one_is_counted_once():
    wrapped = f"%inner (p: f32[8]) -> f32[2] {{\n  ROOT %r = f32[2]{{0}} reduce-scatter(%p), {GROUPS}\n}}\n"
    body = """%s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%inner
    %u = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%s), calls=%inner
    %d = f32[2]{0} async-done(%u), calls=%inner"""
    assert only(body, wrapped).bytes == 32


def test_an_asynchronous_one_of_a_tpu_is_counted_once():
    """It stands in the fusion that starts it, in those that it runs beside, and in the one that ends it."""
    gather = f'%g = bf16[256,64]{{1,0}} all-gather(%p), {GROUPS}, frontend_attributes={{chain_id="7"}}'
    fused = "".join(f"%{n} (p: f32[8]) -> bf16[256,64] {{\n  {gather}\n}}\n" for n in ("start", "beside", "done"))
    calls = [f"%{n} = bf16[256,64]{{1,0}} fusion(%x), kind=kCustom, calls=%{n}" for n in ("start", "beside", "done")]
    assert only("\n".join(calls), fused).bytes == 256 * 64 * 2
    other = fused + f"%more (p: f32[8]) -> bf16[256,64] {{\n  {gather.replace('"7"', '"8"')}\n}}\n"
    calls.append("%m = bf16[256,64]{1,0} fusion(%x), kind=kCustom, calls=%more")
    assert len(hlo.collectives(program("\n".join(calls), other))) == 2


def test_a_reduce_scatter_of_a_tpu_is_a_fusion():
    fused = f"""%all-reduce-scatter.6.clone (p: f32[256,64]) -> f32[64,64] {{
  %r = f32[256,64]{{1,0}} all-reduce(%p), {GROUPS}, to_apply=%add
  ROOT %s = f32[64,64]{{1,0}} dynamic-slice(%r, %o, %z), dynamic_slice_sizes={{64,64}}
}}
"""
    found = only("%f = f32[64,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.6.clone", fused)
    assert (found.kind, found.bytes, found.sent) == ("reduce-scatter", 65536, 65536 * 3 / 4)


# -- who takes part -----------------------------------------------------------------------------------------------

MEMBERS = {
    "replica_groups=[2,4]<=[8]": (0, 1, 2, 3),
    "replica_groups=[2,4]<=[4,2]T(1,0)": (0, 2, 4, 6),
    "replica_groups=[4,4]<=[2,4,2]T(1,0,2)": (0, 1, 8, 9),
    "replica_groups={{0,2,4,6},{1,3,5,7}}": (0, 2, 4, 6),
    "replica_groups={{0,1,2,3}}": (0, 1, 2, 3),
    "replica_groups={}": (),
    "replica_groups=mesh['data'=1,'fsdp'=4,'tensor'=2] {'fsdp'}": (0, 2, 4, 6),
    "replica_groups=mesh['data'=1,'fsdp'=4,'tensor'=2] {'tensor'}": (0, 1),
    "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}": (0, 1, 4, 5),
    "replica_groups=mesh['axis_0'=4] {'axis_0'}": (0, 1, 2, 3),
    "source_target_pairs={{0,2},{2,4},{4,6},{6,0}}": (0, 2),
}


@pytest.mark.parametrize("written", MEMBERS)
def test_members(written):
    assert only(f"%a = f32[8]{{0}} all-reduce(%x), channel_id=1, {written}, to_apply=%sum").members == MEMBERS[written]


def test_a_group_of_all_sends_as_much_as_a_very_large_one():
    assert only("%a = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%sum").sent == 64


# -- loops --------------------------------------------------------------------------------------------------------

REDUCE = f'%a = f32[4]{{0}} all-reduce(%p), {GROUPS}, to_apply=%sum, metadata={{op_name="jit(f)/while/body/psum"}}'
BODY = f"%body (p: f32[4]) -> f32[4] {{\n  {REDUCE}\n}}\n"
CONDITION = """%condition (p: (s32[], f32[4])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(36)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
"""
LOOP = "%w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body"


def test_loops_that_say_how_often_they_turn():
    config = '"known_induction_variable":{"tuple_index":"0"},"known_trip_count":{"n":"5"}'
    found = only(f"{LOOP}, backend_config={{{config}}}", BODY + CONDITION)
    assert (found.times, found.depth, found.sent) == (5, 1, 16 * 5 * 2 * 3 / 4)
    assert found.source == "jit(f)/while/body/psum"


def test_loops_of_a_tpu_say_it_in_their_condition():
    assert only(LOOP, BODY + CONDITION).times == 36


def test_a_loop_that_is_unrolled_counts_by_more_than_one():
    """As XLA has the collective matmuls of a TPU."""
    body = f"""%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %two = s32[]{{:T(128)}} constant(2)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %next = s32[]{{:T(128)}} add(%i, %two)
  {REDUCE}
  ROOT %t = (s32[]{{:T(128)}}, f32[4]{{0}}) tuple(%next, %a)
}}
"""
    assert only(LOOP, body + CONDITION).times == 18
    assert only(LOOP, body + CONDITION.replace("constant(36)", "constant(7)")).times == 4


def test_a_loop_that_does_not_say_counts_once():
    assert only(LOOP, BODY + CONDITION.replace("constant(36)", "parameter(1)")).times == 1


def test_loops_in_loops_and_branches_multiply():
    outer = f"%outer (p: f32[4]) -> f32[4] {{\n  {LOOP}\n}}\n"
    branch = BODY.replace("%body", "%branch")
    body = """%w = (s32[], f32[4]{0}) while(%t), body=%outer, backend_config={"known_trip_count":{"n":"3"}}
    %c = f32[4]{0} conditional(%i, %t, %t), branch_computations={%branch, %nothing}"""
    found = hlo.collectives(program(body, BODY + CONDITION + outer + branch))
    assert [(one.times, one.depth) for one in found] == [(108, 2), (1, 0)]
    assert hlo.by_kind(found) == {"all-reduce": {"in_loops": 108 * 24.0, "outside": 24.0}}


# -- arrays -------------------------------------------------------------------------------------------------------


def test_the_largest_arrays_leave_out_what_is_none():
    fused = "%inside (p: f32[8]) -> f32[8] {\n  %huge = f32[4096,4096]{1,0} broadcast(%p)\n}\n"
    body = """%x = f32[1024,1024]{1,0} parameter(0)
    %t = (f32[1024,1024]{1,0}) tuple(%x)
    %f = f32[8,8]{1,0} fusion(%x), kind=kLoop, calls=%inside, metadata={op_name="first"}
    %g = f32[8,8]{1,0} fusion(%x), kind=kLoop, calls=%inside, metadata={op_name="first"}
    %b = (bf16[64]{0}, pred[16]{0}, s4[16]{0}, f8e4m3fn[24]{0}) custom-call(%x), custom_call_target="y\""""
    found = hlo.largest_buffers(program(body, fused))
    assert found == [
        (256, "f32[8,8]", "first"), (128, "bf16[64]", ""), (24, "f8e4m3fn[24]", ""), (16, "pred[16]", ""),
        (8, "s4[16]", ""),
    ]  # fmt: skip
    assert hlo.largest_buffers(program(body, fused), count=1) == found[:1]


def test_shapes():
    assert hlo.shapes("%a = (bf16[4,8]{1,0:T(8,128)(2,1)}, s32[]) fusion(f32[3]{0} %b)") == {(4, 8), (), (3,)}


# -- a real program -----------------------------------------------------------------------------------------------


def test_a_program_compiled_here():
    mesh = sharding.make_mesh(1, 4, 2)

    def turn(x, _):
        whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        summed = jax.lax.psum(x * whole.sum(), "tensor")
        scattered = jax.lax.psum_scatter(whole * 2, "fsdp", scatter_dimension=0, tiled=True)
        return summed + scattered + jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

    loop = lambda x: jax.lax.psum(jax.lax.scan(turn, x, None, length=5)[0], ("fsdp", "tensor"))
    mapped = jax.shard_map(loop, mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 128), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    text = jax.jit(mapped).lower(x).compile().as_text()
    found = {(c.kind, c.depth): (c.bytes, c.times, len(c.members), c.sent) for c in hlo.collectives(text)}
    part, whole = 8 * 128 * 4, 32 * 128 * 4
    assert found == {
        ("all-gather", 1): (whole, 5, 4, whole * 5 * 3 / 4),
        ("all-reduce", 1): (part, 5, 2, part * 5 * 2 / 2),
        ("reduce-scatter", 1): (whole, 5, 4, whole * 5 * 3 / 4),
        ("collective-permute", 1): (part, 5, 2, part * 5),
        ("all-reduce", 0): (part, 1, 8, part * 2 * 7 / 8),
    }
    assert hlo.largest_buffers(text, 1)[0][:2] == (whole, "f32[32,128]")
    assert {(32, 128), (8, 128)} <= hlo.shapes(text)
