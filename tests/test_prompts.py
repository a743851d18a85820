"""Text encoders and expanders from elsewhere: what they give, and how they fail."""
import http.server
import json
import sys
import threading
import time

import pytest
import torch

from sora_lite.dit import DiT
from sora_lite.pipeline import Denoiser, SoraLite, flow_loss
from sora_lite.prompts import (ChatExpander, FolderEncoder, FolderExpander, LittleExpander, checked, expander_loss,
                               text_encoder_of)
from sora_lite.shapes import Shapes, caption, vocabulary
from sora_lite.text import TextEncoder, Vocabulary
from sora_lite.train import fit
from sora_lite.vae import VideoVAE

PAIRS = [("a red circle", "a large red circle moves left on a navy background"),
         ("an orange star", "a small orange star stays still on a sand background")]


def little(**options) -> LittleExpander:
    torch.manual_seed(0)
    return LittleExpander(vocabulary(), **dict(width=32, depth=1, heads=2) | options).eval()


def test_it_learns_to_go_on():
    model = little(width=64, depth=2)
    fit(model, lambda k, g: PAIRS, expander_loss, steps=60, warmup=5, ema=0.9, bf16=False)
    assert model.expand([a for a, _ in PAIRS], temperature=0) == [b for _, b in PAIRS]


def test_only_the_full_prompt_is_asked_of_it(generator):
    model = little()
    each = torch.stack([expander_loss(model, [pair], generator).detach() for pair in PAIRS])
    words = torch.tensor([len(model.vocabulary.encode(b)) + 1.0 for _, b in PAIRS])
    mean = float((each * words).sum() / words.sum())
    assert float(expander_loss(model, PAIRS, generator).detach()) == pytest.approx(mean, rel=1e-4)
    (slope,) = torch.autograd.grad(expander_loss(model, PAIRS[:1], generator), model.say.bias)
    asked = set(model.vocabulary.encode(PAIRS[0][1])) | {0}            # the full prompt and its end
    assert {i for i in range(len(slope)) if slope[i] < 0} == asked


def test_expansions_end_and_a_seed_is_a_seed():
    model = little()
    draw = lambda seed: model.expand(["a red circle"] * 3, generator=torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1) != draw(2)
    assert all(len(text.split()) < 64 for text in draw(1))
    with pytest.raises(ValueError, match="crimson"):
        model.expand(["a crimson disc"])
    with pytest.raises(ValueError, match="empty"):
        model.expand([" "])


def test_a_prompt_or_pair_that_is_too_long_is_a_sentence():
    model, words = little(longest=16), lambda n: " ".join(["red"] * n)
    assert len(model.expand([words(14)])) == 1
    for n in (15, 30):
        with pytest.raises(ValueError, match=f"the prompt has {n} words, this expander goes on from at most 14"):
            model.expand([words(n)])
    assert expander_loss(model, [(words(5), words(10))], None).isfinite()
    with pytest.raises(ValueError, match="a pair of prompts has 16 words, this expander reads 15"):
        expander_loss(model, [("red", "blue"), (words(5), words(11))], None)


def test_the_little_expander_travels(tmp_path):
    model = little()
    with torch.no_grad():                              # as saved: in half precision
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.save_pretrained(tmp_path)
    numbers = torch.tensor([model.vocabulary.encode("a red circle") + [0]])
    assert torch.equal(LittleExpander.from_pretrained(tmp_path)(numbers), model(numbers))


def test_expansions_are_checked(capsys):
    words, prompts = Vocabulary(vocabulary()), ["a red circle", "a blue star"]
    good = ["a large red circle moves left on a sand background", "a small blue star"]
    assert checked(prompts, good, words) == good
    for bad, reason in (("", "empty"), ("Sure! Here is one", "sure"), ("a large red ring", "circle"),
                        ("a red circle and a blue star", "1")):
        with pytest.raises(ValueError, match=reason):
            checked(prompts, [bad, good[1]], words)
        assert checked(prompts, [bad, good[1]], words, keep=True) == [prompts[0], good[1]]
        assert "kept 'a red circle'" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one for each"):
        checked(prompts, good[:1], words)


class StandIn(http.server.BaseHTTPRequestHandler):
    """A chat endpoint of which the path says how it behaves."""
    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, dict(self.headers), body))
        how = self.path.split("/")[1]
        said = json.dumps(dict(choices=[dict(message=dict(role="assistant", content=' "A large red circle." '))]))
        if how == "mute":
            time.sleep(5)
        self.send_response(401 if how == "locked" else 200)
        self.end_headers()
        try:
            if how == "drip":                       # a byte now and then: no single wait is long
                for _ in range(25):
                    self.wfile.write(b" ")
                    time.sleep(0.2)
            else:
                self.wfile.write({"page": "<html>hello</html>", "other": '{"answer": 3}',
                                  "none": '{"choices": []}', "bytes": "\x00\xff"}.get(how, said).encode())
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_chat_endpoint_is_asked_as_it_expects(address):
    writer = ChatExpander(f"{address}/v1/", "tiny", key="secret", examples=PAIRS, words=["red", "circle"])
    assert writer.expand(["a red circle", "a circle"]) == ["A large red circle"] * 2
    path, headers, body = StandIn.asked[-1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "tiny"
    roles = [m["role"] for m in body["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert body["messages"][-1]["content"] == "a circle" and "red circle" in body["messages"][0]["content"]


@pytest.mark.parametrize("how", ["page", "other", "none", "bytes"])
def test_nonsense_from_an_endpoint_is_shown(address, how):
    with pytest.raises(ValueError, match="not as a chat endpoint"):
        ChatExpander(f"{address}/{how}").expand(["a red circle"])


@pytest.mark.parametrize("how", ["mute", "drip"])
def test_a_slow_endpoint_is_left_in_time(address, how):
    begun = time.time()
    with pytest.raises(TimeoutError, match="within 0.5 s"):
        ChatExpander(f"{address}/{how}", seconds=0.5).expand(["a red circle"])
    assert time.time() - begun < 3


def test_a_dead_or_locked_endpoint_says_what_to_do(address):
    with pytest.raises(ConnectionError, match="start the endpoint"):
        ChatExpander("http://127.0.0.1:9/v1", seconds=3).expand(["a red circle"])
    with pytest.raises(ConnectionError, match="401.*key") as error:
        ChatExpander(f"{address}/locked", key="secret").expand(["a red circle"])
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="http://"):
        ChatExpander("localhost:8000")


def test_a_missing_library_or_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for kind in (FolderEncoder, FolderExpander):
        with pytest.raises(ImportError, match="pip install transformers"):
            kind(tmp_path)
    assert isinstance(text_encoder_of("own", vocabulary(), width=48), TextEncoder)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is optional and not installed")


@pytest.fixture(scope="module")
def tokenizer(transformers):
    """One of words, with an end mark, made here: nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>",
                                                unk_token="<unk>")


@pytest.fixture(scope="module", params=["t5", "clip", "clip_text", "bert"])
def folder(request, transformers, tokenizer, tmp_path_factory):
    """A tiny randomly initialised text encoder of some kind, as a local folder."""
    torch.manual_seed(0)
    t, path, words = transformers, tmp_path_factory.mktemp(request.param), len(tokenizer)
    text = dict(vocab_size=words, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                eos_token_id=1, pad_token_id=0)
    vision = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=8)
    make = {"t5": lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=words, d_model=24, d_kv=8, d_ff=32,
                                                                  num_layers=2, num_heads=2)),
            "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision)),
            "clip_text": lambda: t.CLIPTextModel(t.CLIPTextConfig(**text)),
            "bert": lambda: t.BertModel(t.BertConfig(**text))}
    make[request.param]().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_pretrained_encoder_reads_captions(folder):
    text = FolderEncoder(folder)
    captions = ["a red circle", None, "a small blue star moves left on a black background"]
    features, lengths = text(captions)
    assert text.width == 24 and features.shape == (sum(lengths), 24)
    assert lengths == [len(text.vocabulary.encode(c)) for c in captions] and lengths[2] > lengths[0] > lengths[1]
    for alone, part in zip(captions, features.split(lengths)):      # what fills a batch up is not read
        assert (text([alone])[0] - part).abs().max() < 1e-4
    assert (text(["a blue circle"])[0] - features[:lengths[0]]).abs().max() > 1e-3
    assert not [p for p in text.train().parameters() if p.requires_grad] and not text.model.training


def test_it_stands_in_the_place_of_chapter_5s(folder, generator):
    text = FolderEncoder(folder)
    dit = DiT(channels=16, width=32, depth=1, heads=2, words_width=text.width, conv_depth=0)
    model = Denoiser(text, dit)
    batch = [torch.randn(4, 1, 4, 4, generator=generator)] * 3, ["a red circle", "a blue star", "a red circle"]
    before = [p.clone() for p in text.parameters()]
    fit(model, lambda k, g: batch, flow_loss, steps=2, bf16=False)
    assert all(torch.equal(a, b) for a, b in zip(before, text.parameters())), "a frozen encoder stays what it is"
    vae = VideoVAE(channels=4, widths=(16, 24), encoder=(1, 1), decoder=(1, 1))
    pipe = SoraLite(vae, text, dit, defaults=dict(num_inference_steps=2))
    assert pipe("a red circle", frames=1, height=32, width=32).shape == (1, 3, 1, 32, 32)


def test_bad_prompts_and_folders_for_a_pretrained_encoder(folder, tmp_path, transformers):
    text = FolderEncoder(folder, longest=5)
    with pytest.raises(ValueError, match="empty"):
        text(["  "])
    with pytest.raises(ValueError, match="shorten"):
        text(["a small blue star moves left on a black background"])
    with pytest.raises(FileNotFoundError, match="config.json"):
        FolderEncoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=str(tmp_path)):
        FolderEncoder(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())    # but no weights
    with pytest.raises(ValueError, match="no whole text encoder"):
        FolderEncoder(tmp_path)


def test_a_language_model_from_a_folder_expands(transformers, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256,
                                     bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    writer = FolderExpander(tmp_path, examples=PAIRS)
    answers = writer.expand(["a red circle", "a blue star"])
    assert len(answers) == 2 and all(isinstance(a, str) and "\n" not in a for a in answers)
    kept = checked(["a red circle", "a blue star"], answers, Vocabulary(vocabulary()), keep=True)
    assert all(Vocabulary(vocabulary()).encode(text) for text in kept)
    with pytest.raises(FileNotFoundError, match="config.json"):
        FolderExpander(tmp_path / "nothing")
