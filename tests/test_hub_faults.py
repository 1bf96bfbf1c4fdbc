"""What real use broke on the way to and from the Hub: leftovers of other weights, a Hub that does not answer, what is
let in.
"""

import json
import os
import re
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import CheckpointError
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_double import HubDouble
from safetensors.torch import load_file, save_file
from warm_client import WarmClient

from vdm_diffusers import HierarchicalVAE, VariationalAutoencoder, VDMPipeline, VDMScheduler, VDMUNet2DModel
from vdm_diffusers.hub import ModelDescription, Provenance, publish_folder, redact, write_model_card
from vdm_diffusers.loading import folder_name, is_on_hub, load_model
from vdm_diffusers.safety import UnsafeCheckpointError, read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"
SECRET = "hf_" + "aB3" * 10
INDEX = f"{WEIGHTS}.index.json"
PRELUDE = """
import json, sys
from vdm_diffusers import VDMPipeline, VariationalAutoencoder
from vdm_diffusers.hub import publish_folder
def show(value):
    print(json.dumps(value))
def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
"""


@pytest.fixture(scope="module")
def hub():
    with HubDouble() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with WarmClient(hub, tmp_path_factory.mktemp("client")) as client:
        yield lambda code, *args, **options: client(PRELUDE + code, *args, **options)


def pipeline(seed: int) -> VDMPipeline:
    torch.manual_seed(seed)
    unet = VDMUNet2DModel(sample_size=6, in_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4)
    torch.nn.init.normal_(unet.conv_out.weight)
    return VDMPipeline(unet, VDMScheduler(beta_schedule="log_snr_linear"), num_levels=17)


def small_vae() -> VariationalAutoencoder:
    torch.manual_seed(0)
    return VariationalAutoencoder(6, 1, 2, (8, 8), norm_num_groups=4, num_levels=17)


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def same_weights(one: VDMPipeline, other: VDMPipeline) -> bool:
    pairs = zip(one.unet.state_dict().values(), other.unet.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --- weights are replaced whole --------------------------------------------------------------------------------------

LAYOUTS = {"sharded": {"max_shard_size": "20KB"}, "whole": {}}


@pytest.mark.parametrize(("first", "second"), [("sharded", "whole"), ("whole", "sharded")])
def test_weights_saved_over_others_are_those_that_load(first, second, tmp_path):
    """Diffusers reads a leftover index before anything else: the older model stays in force."""
    folder = tmp_path / "run"
    pipeline(1).save_pretrained(folder, **LAYOUTS[first])
    half = pipeline(3).to(torch.float16)
    half.save_pretrained(folder, variant="fp16")
    pipeline(2).save_pretrained(folder, **LAYOUTS[second])
    assert same_weights(VDMPipeline.from_pretrained(folder), pipeline(2))
    assert (folder / "unet" / INDEX).exists() == (second == "sharded")
    assert same_weights(VDMPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16), half)  # kept
    # the peer: the index that its own save leaves behind is read before the new weights
    stock = tmp_path / "stock"
    for seed, layout in ((1, "sharded"), (2, "whole")):
        pipeline(seed).unet.save_pretrained(stock, **LAYOUTS[layout])
    with pytest.raises(OSError, match="required according to the checkpoint index"):
        VDMUNet2DModel.from_pretrained(stock)


def test_weights_pushed_over_others_are_those_that_load(hub, client, tmp_path):
    pipeline(1).save_pretrained(tmp_path / "1", **LAYOUTS["sharded"])
    pipeline(2).save_pretrained(tmp_path / "2")
    client("[publish_folder(folder, 'someone/replaced') for folder in sys.argv[1:]]", tmp_path / "1", tmp_path / "2")
    weights = {name for name in hub.files("someone/replaced") if "safetensors" in name}
    assert weights == {f"unet/{WEIGHTS}"}
    code = "show(VDMPipeline.from_pretrained('someone/replaced').unet.conv_out.weight.flatten().tolist())"
    assert client(code) == pytest.approx(pipeline(2).unet.conv_out.weight.flatten().tolist())


# --- a Hub that does not answer, a repository of someone else's ------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503, "no connection"])
@pytest.mark.parametrize("kind", ["VDMPipeline", "VariationalAutoencoder"])
def test_the_cache_serves_where_the_hub_does_not_answer(kind, status, hub, client, tmp_path):
    name = f"someone/cached-{kind.lower()}-{status}".replace(" ", "-")
    (pipeline(1) if kind == "VDMPipeline" else small_vae()).save_pretrained(tmp_path / "run")
    hub.put(
        name, {p.relative_to(tmp_path / "run").as_posix(): p.read_bytes() for p in (tmp_path / "run").rglob("*.*")}
    )
    hub.faults.clear()
    armed = []

    def fail_from_now_on():
        while not (tmp_path / "loaded").exists():
            time.sleep(0.01)
        how = {"status": status} if isinstance(status, int) else {"lose_response": True}
        armed.append(hub.fail_next("", **how, times=10_000))
        (tmp_path / "armed").touch()

    helper = threading.Thread(target=fail_from_now_on, daemon=True)
    helper.start()
    code = f"""
import pathlib, time
{kind}.from_pretrained(sys.argv[1])
pathlib.Path(sys.argv[2], "loaded").touch()
sleep, time.sleep = time.sleep, lambda seconds: None  # of the library, before it tries again
while not pathlib.Path(sys.argv[2], "armed").exists():
    sleep(0.01)
show(error_of({kind}.from_pretrained, sys.argv[1]))
"""
    try:
        assert client(code, name, tmp_path) == ""
        assert armed[0].hits
    finally:
        hub.faults.clear()


def test_a_pull_request_is_opened_where_one_may_not_push(hub, client, tmp_path):
    pipeline(1).save_pretrained(tmp_path / "1")
    pipeline(2).save_pretrained(tmp_path / "2")
    client("publish_folder(sys.argv[1], 'someone/theirs')", tmp_path / "1")
    stranger = hub.add_user("proposer")
    code = "show(publish_folder(sys.argv[1], 'someone/theirs', create_pr=True).pr_revision)"
    revision = client(code, tmp_path / "2", HF_TOKEN=stranger)
    assert revision.startswith("refs/pr/")
    weights = f"unet/{WEIGHTS}"
    assert hub.files("someone/theirs", revision)[weights] == (tmp_path / "2" / weights).read_bytes()
    assert hub.files("someone/theirs")[weights] == (tmp_path / "1" / weights).read_bytes()
    refused = client(
        "show(error_of(publish_folder, sys.argv[1], 'someone/theirs'))", tmp_path / "2", HF_TOKEN=stranger
    )
    assert refused.startswith("PermissionError") and "create_pr" in refused


def test_a_tag_that_is_taken_is_refused_before_anything_is_sent(hub, client, tmp_path):
    pipeline(1).save_pretrained(tmp_path / "1")
    pipeline(2).save_pretrained(tmp_path / "2")
    client("publish_folder(sys.argv[1], 'someone/tagged', tag='v1')", tmp_path / "1")
    commits, asked = len(hub.commits("someone/tagged")), len(hub.log)
    error = client("show(error_of(publish_folder, sys.argv[1], 'someone/tagged', tag='v1'))", tmp_path / "2")
    assert error.startswith("ValueError: `tag` 'v1' exists")
    assert len(hub.commits("someone/tagged")) == commits
    assert not [call for call in hub.log[asked:] if re.search("PUT|POST .*(commit|preupload|batch)", call.target)]


@pytest.mark.parametrize("start", ["hf_", "hf_oauth_", "hf_jwt_", "api_org_"])
def test_secrets_are_known_by_their_shape(start, tmp_path):
    secret = start + "aB3.xY7_"[: 8 if "jwt" in start or "oauth" in start else 3] + "aB3" * 11
    assert secret not in redact(f"python train.py --hub_token {secret} --seed 3") and "seed 3" in redact("x --seed 3")
    pipeline(1).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text(f"---\nlicense: mit\n---\nmy token is {secret}\n")
    with pytest.raises(ValueError, match="token"):
        publish_folder(tmp_path / "run", "someone/secret", token=SECRET)


# --- cards -----------------------------------------------------------------------------------------------------------


def describe(**changes) -> ModelDescription:
    record = Provenance.of_this_run(seed=1, command=changes.pop("command", "python training/train.py"))
    fields = {
        "title": "T",
        "summary": "S",
        "license": "mit",
        "training": "With Adam.",
        "training_data": [],
        "provenance": record,
    }
    fields |= {
        "duration": "1 min",
        "measurements": [],
        "limitations": ["Small."],
        "location": "x",
        "num_inference_steps": 3,
    }
    return ModelDescription(**fields | changes)


def test_a_card_that_somebody_changed_is_kept(tmp_path):
    pipeline(1).save_pretrained(tmp_path)
    first = write_model_card(tmp_path, describe(title="One"))
    write_model_card(tmp_path, describe(title="Two"))
    assert "# Two" in first.read_text() and not list(tmp_path.glob("README.kept*"))
    first.write_text(first.read_text().replace("With Adam.", "With Adam, and with love."))
    write_model_card(tmp_path, describe(title="Three"))
    (kept,) = tmp_path.glob("README.kept*")
    assert "and with love" in kept.read_text() and "# Three" in first.read_text()
    first.write_text("# My own")
    write_model_card(tmp_path, describe(title="Four"))
    assert sorted(path.name for path in tmp_path.glob("README.kept*")) == ["README.kept-1.md", "README.kept-2.md"]


def test_commands_say_nothing_of_this_machines_folders(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inside, outside = str(tmp_path / "here" / "outputs" / "run"), str(tmp_path / "secret" / "data")
    monkeypatch.setattr("sys.argv", ["train.py", "--output_dir", inside, "--train_data_dir", outside])
    command = Provenance.of_this_run(seed=1).command
    assert command == "python train.py --output_dir outputs/run --train_data_dir data"


def test_a_tables_cells_hold_any_text(tmp_path):
    pipeline(1).save_pretrained(tmp_path)
    card = write_model_card(tmp_path, describe(command="python a.py | tee log\nrm x")).read_text()
    assert "| command | `python a.py \\| tee log rm x` |" in card


def test_a_picture_in_another_encoding_is_no_obstacle_and_a_link_out_is(tmp_path, hub, client):
    folder = tmp_path / "run"
    pipeline(1).save_pretrained(folder)
    (folder / "picture.svg").write_bytes("<svg><text>\xe4</text></svg>".encode("latin-1"))
    client("publish_folder(sys.argv[1], 'someone/pictures')", folder)
    assert hub.files("someone/pictures")["picture.svg"] == (folder / "picture.svg").read_bytes()
    (tmp_path / "private.png").write_bytes(b"private")
    (folder / "samples.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(ValueError, match="leads out of the folder"):
        publish_folder(folder, "someone/pictures", token=SECRET)


# --- what is let in --------------------------------------------------------------------------------------------------


def set_scheduler(stock, **values):
    def spoil(folder):
        shutil.rmtree(folder / "scheduler")
        DDPMScheduler().save_pretrained(folder / "scheduler")
        edit(folder / "scheduler" / "scheduler_config.json", _class_name=stock, **values)
        edit(folder / "model_index.json", scheduler=["diffusers", stock])

    return spoil


def set_own(**values):
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **values)


def set_network(name, **config):
    def spoil(folder):
        edit(folder / "model_index.json", unet=["diffusers", name])
        (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": name, **config}))

    return spoil


def pipe_file(folder):
    (folder / "unet" / WEIGHTS).unlink()
    os.mkfifo(folder / "unet" / WEIGHTS)


COSTLY = {
    "a fractional number of timesteps": set_own(num_train_timesteps=2e8),
    "a million timesteps in log SNR": set_own(num_train_timesteps=10**7),
    "a stock table, fractional": set_scheduler("DDPMScheduler", num_train_timesteps=2e8),
    "a million sigmas": set_scheduler("KDPM2DiscreteScheduler", num_train_timesteps=10**6),
    "a million Karras sigmas": set_scheduler(
        "HeunDiscreteScheduler", num_train_timesteps=10**6, use_karras_sigmas=True
    ),
    "a transformer's buffers": set_network("DiTTransformer2DModel", sample_size=16384, num_layers=1),
    "weights in a pipe": pipe_file,
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_too_much_is_refused_before_it_is_built(name, tmp_path):
    pipeline(1).save_pretrained(tmp_path / "run")
    COSTLY[name](tmp_path / "run")
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"\w") as refused:
        VDMPipeline.from_pretrained(tmp_path / "run")
    assert len(str(refused.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 200 * 1024


def renamed(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["other"] = tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS)


def without_map(folder):
    shutil.move(folder / WEIGHTS, folder / "diffusion_pytorch_model-00001-of-00001.safetensors")
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {}}')


def wrongly_mapped(folder):
    small_vae().save_pretrained(folder, max_shard_size="4KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], shards[0])
    (folder / INDEX).write_text(json.dumps(index))


SPOILT = {
    "another class": lambda folder: edit(folder / "config.json", _class_name="HierarchicalVAE"),
    "a renamed tensor": renamed,
    "an index without a map": without_map,
    "tensors said to be in another shard": wrongly_mapped,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_vae_whose_names_do_not_fit_is_refused(name, tmp_path):
    folder = tmp_path / "vae"
    small_vae().save_pretrained(folder)
    VariationalAutoencoder.from_pretrained(folder)
    SPOILT[name](folder)
    with pytest.raises(UnsafeCheckpointError):
        VariationalAutoencoder.from_pretrained(folder)


def test_one_class_is_not_loaded_as_another(tmp_path):
    torch.manual_seed(0)
    HierarchicalVAE(6, 1, 2, 2, (8, 8), norm_num_groups=4, num_levels=17).save_pretrained(tmp_path / "hvae")
    with pytest.raises(UnsafeCheckpointError, match="'HierarchicalVAE', not of a VariationalAutoencoder"):
        VariationalAutoencoder.from_pretrained(tmp_path / "hvae")


@pytest.mark.parametrize(
    "header",
    [
        b"[Infinity]",
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b"\xff\xfe",
        b"{" * 3000,
    ],
    ids=["no object", "dtype as list", "5000 digits", "no offsets", "no text", "nested"],
)
def test_damaged_headers_are_one_kind_of_error(header, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(UnsafeCheckpointError):
        read_header(path)


def test_a_loop_of_links_is_that_error_too(tmp_path):
    (tmp_path / "m.safetensors").symlink_to(tmp_path / "n.safetensors")
    (tmp_path / "n.safetensors").symlink_to(tmp_path / "m.safetensors")
    with pytest.raises(UnsafeCheckpointError):
        read_header(tmp_path / "m.safetensors")


# --- which checkpoint is meant ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["outputs/digits", "model_cards/none", "here/none", "./x/y", "none", "~/x", "a/b/c"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no folder"):
        is_on_hub(name)
    if "/" in name and not name.startswith("here"):
        with pytest.raises(FileNotFoundError, match=r"there is no folder"):
            VDMPipeline.from_pretrained(name)


def test_names_of_the_hub():
    assert is_on_hub("hf://someone/digits") and is_on_hub("google/ddpm-cifar10-32")
    assert folder_name("hf://someone/digits@v1") == "someone--digits--v1"
    assert folder_name("google/ddpm-cifar10-32") == "google--ddpm-cifar10-32"


def test_a_pickle_is_not_loaded_by_any_door(tmp_path):
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "stock", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path / "stock"))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "safe")
    assert isinstance(load_model(str(tmp_path / "safe")), VDMPipeline)
