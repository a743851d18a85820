"""The playground: colours of words, one word changed, and what changed counted on a model that is always right."""
import types

import pytest
import torch

from sora_lite.playground import NAMES, change_rates, colored, reworded, seen
from sora_lite.captioner import statements
from sora_lite.shapes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, Shapes, caption, paths


def test_every_word_that_controls_something_is_coloured():
    page = colored("a large red circle in the upper left bounces left and right on a navy background")
    for phrase, kind in (("large", "size"), ("red", "color"), ("circle", "shape"), ("upper left", "place"),
                         ("bounces left and right", "motion"), ("navy", "background")):
        assert f'title="{kind}">{phrase}</span>' in page
    assert page.count("<span") == 6
    assert "<b>" not in colored("<b>a red circle</b>")


def test_one_word_changes_and_nothing_else(generator):
    world = Shapes()
    scene = world.scenes(world.cast(1, generator))[0]
    for kind, names in NAMES.items():
        value = next(v for v in names if v != (scene if kind == "background" else scene["objects"][0])[kind])
        a, b = (statements(caption(s, "descriptive")) for s in (scene, reworded(scene, kind, value)))
        assert [k for k in a if a[k] != b[k]] == [kind]
    with pytest.raises(ValueError, match="crimson.*no color.*red"):
        reworded(scene, "color", "crimson")
    with pytest.raises(ValueError, match="mood"):
        reworded(scene, "mood", "sad")


def test_what_is_seen_is_the_scene(generator):
    world = Shapes()
    cast = world.cast(12, generator)
    for scene, video in zip(world.scenes(cast), world.render(cast)):
        assert seen(video) == statements(caption(scene, "descriptive"))


class Perfect:
    """A stand-in for the pipeline that draws exactly what a caption of one figure says; noise says where."""
    defaults = dict(frames=17, height=64, width=64)
    device = torch.device("cpu")

    def __init__(self, deaf_to: str = ""):
        self.model = types.SimpleNamespace(dit=types.SimpleNamespace(config=dict(channels=2)))
        self.vae, self.deaf_to = self, deaf_to

    def latent_grid(self, *_):
        return 1, 1, 1

    def latents(self, prompts, grid, *, noise):
        return [(statements(p), int(z.abs().sum() * 1e4)) for p, z in zip(prompts, noise)]

    def __call__(self, prompt, generator):
        self.asked = prompt
        return self.decode([(statements(prompt), int(torch.randint(99, (), generator=generator)))])

    def decode(self, told):
        world, out = Shapes(), []
        for said, place in told:
            index = lambda names, kind: torch.tensor([[0 if kind == self.deaf_to else
                                                       list(names).index(next(iter(said[kind])))]])
            size, motion = index(SIZES, "size"), index(list(MOTIONS.values()), "motion")
            radius = torch.tensor([[sum(list(SIZES.values())[int(size)]) / 2]])
            center = paths(motion, radius, torch.linspace(0, 1, 17), (1, 1), torch.Generator().manual_seed(place))
            out.append(world.render(dict(
                shape=index(SHAPES, "shape"), color=index(COLORS, "color"), size=size, motion=motion,
                radius=radius * 64, center=center * 64, count=torch.tensor([1]), pillar=torch.tensor([False]),
                background=index(BACKGROUNDS, "background")[0])))
        return torch.cat(out)


def test_a_model_that_is_always_right_changes_what_was_asked_alone(generator):
    world = Shapes()
    scenes = world.scenes(world.cast(6, generator))
    rates = change_rates(Perfect(), scenes, generator)
    assert set(rates) == {"noise", "color", "shape", "size", "motion", "background"}
    for word, row in rates.items():
        for kind, share in row.items():
            if kind == "place":
                continue                # these words move the figure, or its middle as the oracle reads it by a hair
            assert share == (kind == word), (word, kind)
    assert rates["noise"]["place"] > rates["color"]["place"] == 0


def test_a_model_deaf_to_a_word_is_found_out(generator):
    world = Shapes()
    scenes = world.scenes(world.cast(6, generator))
    rates = change_rates(Perfect(deaf_to="shape"), scenes, generator)
    assert rates["shape"]["shape"] < 0.7 and rates["color"]["color"] == 1


def test_a_menu_changes_the_prompt_and_says_what_changed(monkeypatch):
    pytest.importorskip("ipywidgets", reason="ipywidgets is optional and not installed")
    import IPython.display
    from sora_lite import playground
    shown, titles, pipe = [], [], Perfect()
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.setattr(playground, "show", lambda videos, said, **_: titles.append(said[0]))
    playground.playground(pipe)
    assert pipe.asked == "a small red circle stays still on a black background" and titles == ["changed: nothing"]
    menus = {w.description: w for w in shown[0].children if hasattr(w, "description")}
    menus["color"].value = "blue"
    assert pipe.asked == "a small blue circle stays still on a black background" and titles[1] == "changed: color"
    menus["noise"].value = 5
    assert len(titles) == 3 and set(titles[2].removeprefix("changed: ").split(", ")) <= {"place", "nothing"}
