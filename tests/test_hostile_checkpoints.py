"""Checkpoints that lie, break, or mean harm: each gives a clear error, runs nothing, and spends neither memory nor
disk.
"""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_double import File, HubDouble
from safetensors.torch import save_file
from warm_client import WarmClient

from vdm_diffusers import (
    HierarchicalVAE,
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)
from vdm_diffusers.safety import UnsafeCheckpointError, parse_json, read_header

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MARK = "executed"

# Loads a folder under a limit on memory, with the clock running, and says what happened.
LOAD = """
import json, os, resource, sys, time
from vdm_diffusers import VDMPipeline
VDMPipeline.from_pretrained(sys.argv[2])  # whatever loading imports is not the hostile one's doing
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + 400 * 2**20, -1))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
error = kind = ""
try:
    VDMPipeline.from_pretrained(sys.argv[1])
except Exception as e:
    kind, error = type(e).__name__, str(e)
print(json.dumps([kind, error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - start]))
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    unet = VDMUNet2DModel(sample_size=6, in_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4)
    VDMPipeline(unet, VDMScheduler(beta_schedule="log_snr_linear"), num_levels=17).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubDouble() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with WarmClient(hub, tmp_path_factory.mktemp("client")) as client:
        yield client


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hostile"))


def edit(folder: Path, name: str, **entries) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def shard_outside(folder):
    (folder.parent / "secret.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../secret.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def weights_link_outside(folder):
    secret = folder.parent / "secret"
    (folder / WEIGHTS).rename(secret)
    (folder / WEIGHTS).symlink_to(secret)


def weights_too_long(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 1000)


def weights_cut_short(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def huge_header(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + data[8:])


def overlapping_tensors(folder):
    header = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}
    raw = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 16)


def enormous_tensor(folder):
    raw = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw)


def only_a_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / MARK)))


def own_pipeline_code(folder):
    (folder / "evil.py").write_text(f"open({str(folder.parent / MARK)!r}, 'w')\n")
    edit(folder, "model_index.json", _class_name=["evil", "Pipeline"])


def own_component_code(folder):
    (folder / "unet" / "evil.py").write_text(f"open({str(folder.parent / MARK)!r}, 'w')\n")
    edit(folder, "model_index.json", unet=["evil", "Network"])


def code_in_the_place_of_ours(folder):
    """The layout of published models, but the code is another's: the installed package is used, so this one loads."""
    for name in ("vdm_diffusers.py", "unet/vdm_diffusers.py", "scheduler/vdm_diffusers.py"):
        (folder / name).write_text(f"open({str(folder.parent / MARK)!r}, 'w')\n")


def set_scheduler(**entries):
    return lambda folder: edit(folder, "scheduler/scheduler_config.json", **entries)


def set_unet(**entries):
    return lambda folder: edit(folder, "unet/config.json", **entries)


def set_index(**entries):
    return lambda folder: edit(folder, "model_index.json", **entries)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def drop_tensors(folder):
    save_file({"conv_in.weight": torch.zeros(8, 5, 3, 3)}, folder / WEIGHTS)


HOSTILE = {
    "shard outside the folder": (shard_outside, "names the shard '../../secret.safetensors'"),
    "weights that link outside": (weights_link_outside, "leads out of the checkpoint"),
    "weights longer than they say": (weights_too_long, "not fully covered"),
    "weights cut short": (weights_cut_short, "cut short"),
    "header of 2^60 bytes": (huge_header, "its header alone has 1152921504606846976"),
    "overlapping tensors": (overlapping_tensors, "invalid offset"),
    "tensor of 4 TB": (enormous_tensor, "not fully covered"),
    "weights of another shape": (set_unet(hidden_channels=16), "has the shape"),
    "weights that lack tensors": (drop_tensors, "weights lack|room for 1 tensors"),
    "pickled weights": (only_a_pickle, "pickle, which runs code"),
    "huge T": (set_scheduler(num_train_timesteps=10**12), "num_train_timesteps.*1000000000000"),
    "T is text": (set_scheduler(num_train_timesteps="many"), "no VDMScheduler can be built"),
    "betas that are NaN": (set_scheduler(trained_betas=[float("nan")] * 1000), "holds NaN"),
    "infinite end point": (write("scheduler/scheduler_config.json", '{"log_snr_max": 1e999}'), "holds 1e999"),
    "swapped end points": (set_scheduler(log_snr_max=-5.0, log_snr_min=13.3), "Did you pass gamma"),
    "a network of 10^7 layers": (set_unet(layers_per_block=10**7), "10000000 layers"),
    "a network 10^9 wide": (set_unet(hidden_channels=10**9), "hidden_channels.*at most"),
    "a network 64000 wide": (set_unet(hidden_channels=64000), "has the shape"),
    "10^12 levels": (set_index(num_levels=10**12), "num_levels"),
    "unknown class": (set_index(unet=["vdm_diffusers", "Backdoor"]), "Backdoor"),
    "a class that is no network": (set_index(unet=["os", "system"]), "`system` of `os`"),
    "a module to be imported": (set_index(unet=["antigravity", "Model"]), "antigravity"),
    "a path as library": (set_index(scheduler=["../evil", "Model"]), "library, class"),
    "pipeline code without trust": (own_pipeline_code, "must say `_class_name` VDMPipeline"),
    "component code without trust": (own_component_code, "trust_remote_code=True"),
    "a further component": (set_index(vae=["diffusers", "AutoencoderKL"]), "components unet, scheduler, got"),
    "deep nesting": (write("unet/config.json", "[" * 10**6 + "]" * 10**6), "nested 1000000 deep"),
    "a config of 6 MB": (write("unet/config.json", json.dumps({"x": "y" * 6 * 2**20})), "at most 4194304"),
    "an error page in place of a config": (write("unet/config.json", "<html>404</html>"), "is not JSON"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "has no scheduler/scheduler_config.json"),
    "a newer format": (set_index(format_version=99), "newer vdm-diffusers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoint(name, folder, good, client):
    spoil, message = HOSTILE[name]
    spoil(folder)
    kind, error, grown_kib, seconds = client(LOAD, folder, good)
    assert kind in ("UnsafeCheckpointError", "ValueError"), error

    assert re.search(message, error, flags=re.DOTALL), error
    assert len(error) < 1000 and grown_kib < 64 * 1024 and seconds < 20
    assert not (folder.parent / MARK).exists()


def test_the_unspoilt_checkpoint_loads_and_strange_code_beside_it_is_not_run(folder, good, client):
    code_in_the_place_of_ours(folder)
    kind, error, _, _ = client(LOAD, folder, good)
    assert (kind, error) == ("", "")
    assert not (folder.parent / MARK).exists()


# --- on the Hub: refused before weights are downloaded ---------------------------------------------------------------

FROM_HUB = """
import json, os, sys
from vdm_diffusers import VDMPipeline
kind = error = ""
try:
    VDMPipeline.from_pretrained(sys.argv[1])
except Exception as e:
    kind, error = type(e).__name__, str(e)
held = sum(os.path.getsize(os.path.join(at, f)) for at, _, fs in os.walk(os.environ["HF_HOME"]) for f in fs)
print(json.dumps([kind, error, held]))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huge T", "num_train_timesteps"),
        ("a network of 10^7 layers", "10000000 layers"),
        ("pickled weights", "no weights as safetensors"),
        ("unknown class", "Backdoor"),
        ("a config of 6 MB", "at most 4194304"),
        ("deep nesting", "nested 1000000 deep"),
        ("weights far too large", "has 1099511627776 bytes"),
        ("path that leads out", "leads out of it"),
    ],
)
def test_hostile_repository(name, message, folder, hub, client):
    repo = f"someone/{name.replace(' ', '-').replace('^', '')}"
    hub.put(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")})
    if name in HOSTILE:
        HOSTILE[name][0](folder)
        changed = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        gone = dict.fromkeys(set(hub.files(repo)) - set(changed) - {".gitattributes"})
        hub.put(repo, changed | gone)
    elif name == "path that leads out":
        hub.put(repo, {"../../evil.json": "{}"})
    else:
        hub.put(repo, {WEIGHTS: File(b"few", lfs=True, claimed_size=2**40)})
    asked = len(hub.log)
    kind, error, held = client(FROM_HUB, repo)
    assert kind == "UnsafeCheckpointError" and message in error, (kind, error)
    assert held < 5 * 2**20
    asked_for = [call.target for call in hub.log[asked:]]
    assert asked_for and not [target for target in asked_for if ".safetensors" in target or ".bin" in target]


# --- components alone are bounded by their constructors --------------------------------------------------------------

COMPONENT = LOAD.replace("from vdm_diffusers import VDMPipeline", "from vdm_diffusers import *").replace(
    "    VDMPipeline.from_pretrained(sys.argv[1])",
    "    globals()[sys.argv[3]].from_pretrained(sys.argv[1], subfolder=sys.argv[4], **json.loads(sys.argv[5]))",
)


@pytest.mark.parametrize(
    ("cls", "part", "entries", "message"),
    [
        ("VDMScheduler", "scheduler", {"num_train_timesteps": 10**12}, r"integer in 1\.\.1000000"),
        ("VDMUNet2DModel", "unet", {"layers_per_block": 10**8}, "`layers_per_block` must be at most"),
        ("VDMUNet2DModel", "unet", {"hidden_channels": 10**8}, "`hidden_channels` must be at most"),
        ("VDMUNet2DModel", "unet", {"hidden_channels": 16}, "size mismatch|shape"),
    ],
)
def test_hostile_component(cls, part, entries, message, folder, good, client):
    edit(folder, f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json", **entries)
    options = {"use_safetensors": True} if part == "unet" else {}
    kind, error, grown_kib, seconds = client(COMPONENT, folder, good, cls, part, json.dumps(options))
    assert kind in ("ValueError", "RuntimeError") and re.search(message, error), (kind, error)
    assert grown_kib < 64 * 1024 and seconds < 20


# --- VAEs, and VAEs with a diffusion prior ---------------------------------------------------------------------------


def pickled(folder):
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def cut_short(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


HOSTILE_VAES = {
    "pickled weights": (pickled, "is a pickle"),
    "weights cut short": (cut_short, "cut short"),
    "a network of 10^7 layers": (
        lambda folder: edit(folder, "config.json", layers_per_block=10**7),
        "10000000 layers",
    ),
    "wider than its weights": (lambda folder: edit(folder, "config.json", latent_channels=4), "has the shape"),
    "a number beyond all bounds": (lambda folder: edit(folder, "config.json", in_channels=10**12), "at most"),
}


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    vae = VariationalAutoencoder(6, 1, 2, (8, 8), norm_num_groups=4, num_levels=17)
    unet = VDMUNet2DModel(sample_size=3, in_channels=2, hidden_channels=8, layers_per_block=1, norm_num_groups=4)
    LatentVDMPipeline(vae, unet, VDMScheduler(beta_schedule="log_snr_linear")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE_VAES)
def test_hostile_vae_alone_and_in_its_pipeline(name, latent, tmp_path, hub, client):
    spoil, message = HOSTILE_VAES[name]
    folder = Path(shutil.copytree(latent, tmp_path / "hostile"))
    LatentVDMPipeline.from_pretrained(folder)  # as it is meant
    spoil(folder / "vae")
    with pytest.raises(UnsafeCheckpointError, match=message):
        VariationalAutoencoder.from_pretrained(folder / "vae")
    with pytest.raises(UnsafeCheckpointError, match=message):
        VariationalAutoencoder.from_pretrained(folder, subfolder="vae")
    with pytest.raises(UnsafeCheckpointError, match=message):
        LatentVDMPipeline.from_pretrained(folder)
    if name != "wider than its weights" and name != "weights cut short":  # seen in the weights alone
        repo = f"someone/latent-{len(name)}"
        hub.put(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")})
        load = FROM_HUB.replace("VDMPipeline", "LatentVDMPipeline")
        kind, error, held = client(load, repo)
        assert kind == "UnsafeCheckpointError" and held < 5 * 2**20, error


def test_a_latent_pipeline_is_not_taken_for_another(latent, good):
    with pytest.raises(UnsafeCheckpointError, match=r"Load it by LatentVDMPipeline\.from_pretrained"):
        VDMPipeline.from_pretrained(latent)
    with pytest.raises(UnsafeCheckpointError, match="must say `_class_name` LatentVDMPipeline"):
        LatentVDMPipeline.from_pretrained(good)
    for cls, folder in ((VariationalAutoencoder, latent / "vae"), (HierarchicalVAE, latent / "vae")):
        with pytest.raises(ValueError, match="use_safetensors"):
            cls.from_pretrained(folder, use_safetensors=False)


# --- the two readers on their own ------------------------------------------------------------------------------------


def test_headers_say_what_safetensors_says(tmp_path):
    tensors = {"a": torch.zeros(3, 0, 2), "b": torch.zeros((), dtype=torch.bfloat16), "c": torch.ones(2, 5).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_header(tmp_path / "x.safetensors") == {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize("cut", [0, 5, 8, 20])
def test_stumps_are_no_safetensors(cut, good, tmp_path):
    (tmp_path / "x").write_bytes((good / WEIGHTS).read_bytes()[:cut])
    with pytest.raises(UnsafeCheckpointError):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_real_configs_are_read_unchanged(name, good):
    data = (good / name).read_bytes()
    assert parse_json(data, name) == json.loads(data)
    assert parse_json(b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[", "b": [1.5, -3, "\\""]}', "x") == {
        "a": "[" * 24,
        "b": [1.5, -3, '"'],
    }
