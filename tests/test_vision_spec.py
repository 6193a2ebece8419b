"""engine/models/vision.py and vision_spec.py: released towers, their sizes, and how pictures stand in a prompt."""

from dataclasses import replace

import pytest

from engine.models.presets import preset
from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec, MediaSpec, SiglipSpec
from engine.tensors import n_weights
from tests import tiny
from tests.configs import refuses, spec_of, without
from tests.released import N_PUBLISHED, N_SCALARS, N_VISION, RELEASED, VISION

E_TOWER = Gemma4TowerSpec(768, 3072, 16, 12, 64, clipped=True)
LARGE_TOWER = Gemma4TowerSpec(1152, 4304, 27, 16, 72, standardize=True)
SIGLIP = SiglipSpec(1152, 4304, 27, 16)
TOWERS = {"gemma-3-4b": SIGLIP, "gemma-3-12b": SIGLIP, "gemma-3-27b": SIGLIP, "gemma-4-e2b": E_TOWER,
          "gemma-4-e4b": E_TOWER, "gemma-4-12b": BlockEmbedderSpec(3840), "gemma-4-26b-a4b": LARGE_TOWER,
          "gemma-4-31b": LARGE_TOWER}
SEEING = ("gemma3", "gemma4", "gemma4-moe", "gemma4-e", "unified")


# --- released models

@pytest.mark.parametrize("name", RELEASED)
def test_released_towers_and_ids(name):
    media = preset(name).media
    if name not in TOWERS:
        assert media is None
        return
    assert media.tower == TOWERS[name]
    ids = (262144, None, 255999, 256000) if "gemma-3" in name else (258880, 258884, 255999, 258882)
    assert (media.image_token, media.video_token, media.begin_image, media.end_image, media.pad) == (*ids, 0)


@pytest.mark.parametrize("name", VISION)
def test_released_weights(name):
    """Text, tower and projector are what the files hold, but for audio parts and K and V that no layer reads."""
    n_vision = n_weights(preset(name)) - n_weights(preset(name).text_only())
    assert n_vision == N_VISION[name] + N_SCALARS[name]
    n_audio = {"gemma-4-e2b": 304_824_608 + 1536 * 1536, "gemma-4-e4b": 304_824_608 + 1536 * 2560,
               "gemma-4-12b": 640 * 3840}.get(name, 0)
    n_left_over = {"gemma-4-e2b": 18_880_512, "gemma-4-e4b": 55_055_616}.get(name, 0)
    assert RELEASED[name].n_params + N_VISION[name] + n_audio + n_left_over == N_PUBLISHED[name]


@pytest.mark.parametrize("name", RELEASED)
def test_who_sees_a_picture_whole(name):
    """Gemma 3 and the 12B: every layer, the 12B beyond its windows. Gemma 4: sliding layers, of the models that are not
    meant for phones."""
    spec = preset(name)
    for layer in spec.layers:
        is_local = layer.attention.window is not None
        sees = name in TOWERS and ("gemma-3" in name or name == "gemma-4-12b"
                                   or (name in ("gemma-4-26b-a4b", "gemma-4-31b") and is_local))
        assert layer.attention.sees_blocks == sees
        assert layer.attention.sees_whole_blocks == (name == "gemma-4-12b" and is_local)
    assert spec.has_blocks == any(layer.attention.sees_blocks for layer in spec.layers)


# --- sizes

@pytest.mark.parametrize(("tower", "patch_side", "patch_width", "pool_side", "block_side", "budgets", "most_patches"), [
    (LARGE_TOWER, 16, 768, 3, 48, (70, 140, 280, 560, 1120), 10080),
    (SIGLIP, 14, 588, 4, 56, (256,), 4096),
    (BlockEmbedderSpec(3840), 48, 6912, 1, 48, (70, 140, 280, 560, 1120), 1120),
])
def test_sizes(tower, patch_side, patch_width, pool_side, block_side, budgets, most_patches):
    assert (tower.patch_side, tower.patch_width, tower.pool_side) == (patch_side, patch_width, pool_side)
    assert (tower.block_side, tower.budgets) == (block_side, budgets)
    assert (tower.most_tokens, tower.most_patches) == (budgets[-1], most_patches)


def test_siglip_heads_and_grid():
    assert (SIGLIP.head_dim, SIGLIP.grid, SIGLIP.n_positions) == (72, 64, 4096)
    assert SIGLIP.scale == 72**-0.5


# --- config.json

@pytest.mark.parametrize("family", SEEING)
def test_without_a_vision_section_there_is_text(family):
    """Left out or null, whatever ids there are: the same ModelSpec, which is also that of text_only()."""
    config = tiny.seeing(family, use_bidirectional_attention="vision" if family != "gemma3" else False)
    spec = spec_of(config)
    assert isinstance(spec.media, MediaSpec) and spec.has_blocks
    text = spec.text_only()
    assert text.media is None and not text.has_blocks and text.text_only() is text
    assert replace(text, media=spec.media, layers=spec.layers) == spec
    assert spec_of(without(config, "vision_config")) == spec_of({**config, "vision_config": None}) == text


@pytest.mark.parametrize(("flag", "sees"), [("vision", {False, True}), (None, {False}), (False, {False})])
def test_gemma4_says_whether_pictures_are_seen_whole(flag, sees):
    spec = spec_of(tiny.seeing("gemma4", use_bidirectional_attention=flag))
    assert {layer.attention.sees_blocks for layer in spec.layers} == sees
    assert all(layer.attention.window for layer in spec.layers if layer.attention.sees_blocks)
    assert not spec_of(tiny.flat("gemma4", use_bidirectional_attention="vision")).has_blocks


def test_a_file_without_a_video_id_takes_no_videos():
    config = tiny.seeing("gemma4")
    assert spec_of(config).media.video_token == 59
    assert spec_of(without(config, "video_token_id")).media.video_token is None
    assert spec_of({**config, "video_token_id": None}).media.video_token is None


def test_a_video_id_behind_the_vocabulary_takes_no_videos():
    """transformers writes the released one into every file that does not say another."""
    config = tiny.seeing("gemma4")
    assert spec_of({**config, "video_token_id": 63}).media.video_token == 63
    for token in (64, 258884):
        assert spec_of({**config, "video_token_id": token}) == spec_of({**config, "video_token_id": None})


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "unified"])
def test_ids_outside_the_vocabulary(family):
    config = tiny.seeing(family)
    for key in tiny.IDS["gemma3" if family == "gemma3" else "gemma4"]:
        if key not in ("mm_tokens_per_image", "video_token_id"):
            refuses({**config, key: 64}, f"{key} is 64, expected an id of the vocabulary, below 64")
            assert spec_of({**config, key: 63}) != spec_of(config)


@pytest.mark.parametrize(("family", "key", "default"), [("gemma3", "image_token_index", 262144),
                                                        ("gemma4", "image_token_id", 258880)])
def test_ids_that_are_left_out(family, key, default):
    """They are the released ones, which a small vocabulary does not have."""
    config = tiny.seeing(family)
    refuses(without(config, key), f"{key} is missing, expected an id of the vocabulary, below 64; the default is "
                                  f"{default}")
    large = {**without(config, key), "text_config": {**config["text_config"], "vocab_size": 262208}}
    assert spec_of(large).media.image_token == default


def test_an_id_stands_for_one_thing():
    refuses({**tiny.seeing("gemma4"), "video_token_id": 60}, "video_token_id is 60", "an id of its own")
    refuses({**tiny.seeing("gemma3"), "eoi_token_index": 61}, "eoi_token_index is 61", "an id of its own")


def test_both_spellings_of_gemma3s_ids():
    config = tiny.seeing("gemma3")
    other = {**without(config, "image_token_index"), "image_token_id": 60}
    assert spec_of(other) == spec_of(config) == spec_of({**config, "image_token_id": 60})
    refuses({**config, "image_token_id": 63}, "image_token_id is 63, expected 60, as image_token_index says")


def test_theta_may_lie_a_level_deeper():
    rope = {"rope_type": "axial", "rope_theta": 50.0}
    flat, deep = (spec_of(tiny.seeing("gemma4", {"rope_parameters": section})).media.tower
                  for section in (rope, {"full_attention": rope}))
    assert flat == deep and flat.rope_theta == 50
    assert spec_of(tiny.seeing("gemma4", {"rope_parameters": None})).media.tower.rope_theta == 100


def test_padding_of_the_per_layer_table():
    assert spec_of(tiny.seeing("gemma4-e", pad_token_id=3)).media.pad == 3
    refuses(tiny.seeing("gemma4-e", pad_token_id=64), "text_config.pad_token_id is 64, expected an id of the vocabula")
