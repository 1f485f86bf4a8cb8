import torch

from vae_hyperband.common.randomness import generator


def draw(*key):
    return torch.randn(4, generator=generator(*key)).tolist()


def test_a_draw_depends_on_seed_purpose_and_position_alone():
    assert draw(1, "noise", 7) == draw(1, "noise", 7)
    others = [draw(2, "noise", 7), draw(1, "order", 7), draw(1, "noise", 8)]
    assert draw(1, "noise", 7) not in others
    assert len({tuple(other) for other in others}) == 3


def test_streams_of_neighbouring_seeds_are_not_shifted_copies():
    # seed + position as a key would make (1, 8) and (2, 7) the same stream
    assert draw(1, "noise", 8) != draw(2, "noise", 7)


def test_every_63_bit_seed_is_taken():
    for seed in (0, 2**63 - 1):
        assert generator(seed, "init").initial_seed() >= 0
