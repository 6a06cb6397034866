"""Training steps through the TPU's compiler: what they hold and exchange. `make aot` runs those that need it."""

import pytest

from configs import qwen3_4b
from pallas_kernels import aot
from retention import compiled as serving
from retention.model import Config
from retention.training import compiled

REASON = aot.missing("v5e")


def needs_tpu_compiler(test):
    return pytest.mark.aot(pytest.mark.skipif(REASON is not None, reason=str(REASON))(test))


# As the TPU compiler writes them: layers in a loop of 36, the loss in one whose length depends on the labels.
HLO = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%async_collective_fusion.1 (x: bf16[4,256]) -> bf16[16,256] {
  %x.1 = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,256]{1,0:T(8,128)(2,1)} all-gather(%x.1), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
}

%async_collective_fusion.2 (x: bf16[4,256]) -> bf16[16,256] {
  %x.2 = bf16[4,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,256]{1,0:T(8,128)(2,1)} all-gather(%x.2), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
}

%all-reduce-scatter.7 (k: bf16[64,32], v: bf16[64,32]) -> (bf16[16,32], bf16[16,32]) {
  %k.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %v.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  %all-reduce.7 = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[64,32]{1,0:T(8,128)(2,1)}) all-reduce(%k.1, %v.1), channel_id=3, replica_groups={}, to_apply=%add
  %k.2 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.7), index=0
  %v.2 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.7), index=1
  %zero = s32[]{:T(128)} constant(0)
  %k.3 = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%k.2, %zero, %zero), dynamic_slice_sizes={16,32}
  %v.3 = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%v.2, %zero, %zero), dynamic_slice_sizes={16,32}
  ROOT %parts = (bf16[16,32]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)}) tuple(%k.3, %v.3)
}

%layer (state: (s32[], bf16[36,64,64])) -> (s32[], bf16[36,64,64]) {
  %state.1 = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %piece = bf16[4,256]{1,0:T(8,128)(2,1)} fusion(%state.1), kind=kLoop, calls=%add
  %start = bf16[16,256]{1,0:T(8,128)(2,1)} fusion(%piece), kind=kCustom, calls=%async_collective_fusion.1
  %done = bf16[16,256]{1,0:T(8,128)(2,1)} fusion(%piece), kind=kCustom, calls=%async_collective_fusion.2
  %gradient = (bf16[16,32]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)}) fusion(%done, %done), kind=kCustom, calls=%all-reduce-scatter.7
  ROOT %next = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0:T(8,128)(2,1)}) tuple(%state.1)
}

%layers_left (state: (s32[], bf16[36,64,64])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %layer_index = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %layers = s32[]{:T(128)} constant(36)
  ROOT %more = pred[]{:T(512)} compare(%layer_index, %layers), direction=LT
}

%block (state: (s32[], s32[100])) -> (s32[], s32[100]) {
  %state.3 = (s32[]{:T(128)}, s32[100]{0:T(128)}) parameter(0)
  %moved = (s32[100]{0:T(128)}, s32[100]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%state.3), channel_id=5, source_target_pairs={{0,1}}
  %here = s32[100]{0:T(128)} collective-permute-done(%moved)
  ROOT %next.1 = (s32[]{:T(128)}, s32[100]{0:T(128)}) tuple(%state.3)
}

%blocks_left (state: (s32[], s32[100])) -> pred[] {
  %state.4 = (s32[]{:T(128)}, s32[100]{0:T(128)}) parameter(0)
  ROOT %more.1 = pred[]{:T(512)} get-tuple-element(%state.4), index=0
}

ENTRY %main.1_spmd (x: f32[8,16]) -> f32[8,16] {
  %x.3 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%x.3), channel_id=1, replica_groups=[1,4]<=[4], use_global_device_ids=true, to_apply=%add
  %start.1 = (bf16[2,128]{1,0:T(2,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x.3), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %done.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather-done(%start.1)
  %loop = (s32[]{:T(128)}, bf16[36,64,64]{2,1,0:T(8,128)(2,1)}) while(%x.3), condition=%layers_left, body=%layer
  %loss = (s32[]{:T(128)}, s32[100]{0:T(128)}) while(%x.3), condition=%blocks_left, body=%block
  ROOT %out = f32[8,16]{1,0:T(8,128)} copy(%all-reduce.1)
}
"""


def test_collectives_run_as_often_as_their_loop():
    assert compiled.collectives(HLO) == {
        "all-reduce": (1, 8 * 16 * 4),
        "all-gather": (1 + 36, 8 * 128 * 2 + 36 * 16 * 256 * 2),
        "reduce-scatter": (36, 36 * 2 * 64 * 32 * 2),
        "collective-permute": (1, 100 * 4),
    }


def test_largest_array():
    assert compiled.largest_array(HLO) == (36 * 64 * 64 * 2, "bf16[36,64,64]")


def test_quadratic_finds_scores():
    assert compiled.quadratic("%scores = f32[1,8,512,4096]{3,2,1,0} dot(%q, %k), bf16[4096,1000]", 4096, 4) == ["f32[1,8,512,4096]"]
    assert compiled.quadratic("bf16[4096,4096] f32[4096,512]", 4096, 1) == ["bf16[4096,4096]"]


SMALL = Config(vocab_size=8192, layers=2, embed_dim=384, mlp_dim=1536, query_heads=4, kv_heads=2, head_dim=128, max_positions=2048, qk_norm=True)


@needs_tpu_compiler
def test_small_step():
    config, mesh = qwen3_4b.get_config("math"), {"fsdp": 2, "context": 2}
    programs = {length: compiled.compile_step(config, SMALL, "v5e:2x2", length, mesh) for length in (1024, 2048)}
    text = programs[2048].as_text()
    assert not compiled.quadratic(text, 2048, 2)
    assert {"all-gather", "reduce-scatter"} <= set(compiled.collectives(text))
    assert serving.memory(programs[2048])["temp_bytes"] <= 2.2 * serving.memory(programs[1024])["temp_bytes"]


@needs_tpu_compiler
@pytest.mark.parametrize(
    "mesh, length, message",
    [
        ({"fsdp": 3}, 2048, "does not fit 4 devices"),
        ({"fsdp": 2, "context": 2}, 2050, "does not divide data.length, 2050"),
        ({"rows": 4}, 2048, "an axis 'rows'"),
    ],
)
def test_mesh_that_does_not_fit(mesh, length, message):
    with pytest.raises(ValueError, match=message):
        compiled.compile_step(qwen3_4b.get_config("math"), SMALL, "v5e:2x2", length, mesh)
