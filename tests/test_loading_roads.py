"""Every road by which a user of Diffusers loads a model, each in a clean process with a fresh cache, over HTTP.

docs/hub.md has the table of roads; a test below compares it with the roads here.
"""

import re
from pathlib import Path

import pytest
from hub_double import HubDouble
from warm_client import WarmClient

from vdm_diffusers.hub import CODE_PATHS, travelling_code

ROOT = Path(__file__).resolve().parent.parent

# What every client has. `digest` stands for the exact bits of two samples drawn from a fixed seed.
PRELUDE = """
import hashlib, json, os, sys, warnings
import torch
torch.set_num_threads(1)

def without_package():
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "vdm_diffusers":
                raise ModuleNotFoundError(f"No module named {name!r}")
    sys.meta_path.insert(0, Absent())

def digest(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"batch_size": 2, "num_inference_steps": 4, "output_type": "latent"} | kwargs
    images = pipe(**kwargs, generator=torch.Generator().manual_seed(0)).images
    images = images if isinstance(images, torch.Tensor) else torch.as_tensor(images)
    return hashlib.sha256(images.float().contiguous().numpy().tobytes()).hexdigest()

def show(**values):
    print(json.dumps(values))

def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
"""

PUBLISH = """
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from vdm_diffusers import LatentVDMPipeline, VariationalAutoencoder, VDMPipeline, VDMScheduler, VDMUNet2DModel
from vdm_diffusers.hub import publish_folder
base = sys.argv[1]

def unet(seed):
    torch.manual_seed(seed)
    model = VDMUNet2DModel(sample_size=(6, 4), in_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4,
                           fourier_exponents=(3, 7), dropout=0.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()

scheduler = VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=11.0)
made = {}

def published(name, pipe, cls=None, **kwargs):
    folder = f"{base}/{name}"
    pipe.save_pretrained(folder)
    loaded = (cls or type(pipe)).from_pretrained(folder)
    commit = pipe.push_to_hub(f"someone/{name}", **kwargs)
    output = {} if hasattr(loaded, "decode_latents") else {"output_type": "np"}
    made[name] = {"digest": digest(loaded, **output), "commit": getattr(commit, "oid", "")}

published("model", VDMPipeline(unet(1), scheduler, num_levels=17), tag="v1")
made["old"] = made.pop("model")
pipe = VDMPipeline(unet(2), scheduler, num_levels=17)
published("model", pipe, tag="v2")
half = VDMPipeline(unet(2).half(), scheduler, num_levels=17)
half.push_to_hub("someone/model", variant="fp16")
half.save_pretrained(f"{base}/half", variant="fp16")
made["half"] = {"digest": digest(VDMPipeline.from_pretrained(f"{base}/half", variant="fp16", torch_dtype=torch.float16))}
published("shards", pipe, max_shard_size="8KB")

torch.manual_seed(0)
stock = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
                    norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)).eval()
table = scheduler.as_discrete()
published("mixed", VDMPipeline(stock, DDPMScheduler(), pixel_encoding="endpoint"))
published("stock", DDPMPipeline(stock, DDPMScheduler.from_config(table.config)), DDPMPipeline)
published("stock-ours", DDPMPipeline(stock, table), DDPMPipeline)

torch.manual_seed(3)
vae = VariationalAutoencoder((6, 4), 1, 2, (8, 8), norm_num_groups=4, num_levels=17).eval()
vae.save_pretrained(f"{base}/vae")
publish_folder(f"{base}/vae", "someone/vae")
prior = VDMUNet2DModel(sample_size=(3, 2), in_channels=2, hidden_channels=8, layers_per_block=1, norm_num_groups=4,
                       fourier_exponents=(), dropout=0.0).eval()
published("latent", LatentVDMPipeline(vae, prior, scheduler))
show(**made)
"""


@pytest.fixture(scope="module", params=["Xet", "LFS"])
def storage(request):
    """How large files travel: huggingface_hub takes Xet where `hf_xet` is installed and not switched off."""
    return request.param


@pytest.fixture(scope="module")
def hub(storage):
    with HubDouble() as hub:
        yield hub
        asked_of_xet = hub.requests("(GET|POST) /cas/")
        assert bool(asked_of_xet) == (storage == "Xet")


@pytest.fixture(scope="module")
def client(hub, storage, tmp_path_factory):
    with WarmClient(hub, tmp_path_factory.mktemp("client"), xet=storage == "Xet") as client:
        yield lambda code, *args, **options: client(PRELUDE + code, *args, **options)


@pytest.fixture(scope="module")
def made(hub, client, tmp_path_factory):
    """Digests and commits of what a first process has published."""
    base = tmp_path_factory.mktemp("publisher")
    made = client(PUBLISH, base)
    # a checkpoint as `save_pretrained` alone leaves it, without the code files
    hub.put("someone/plain", base / "model")
    return made


# Road -> (code, name of the digest that it must show). Beside `digest`, whatever else it shows must be true.
ROADS = {
    "VDMPipeline, from the Hub": ("""
from vdm_diffusers import VDMPipeline
show(digest=digest(VDMPipeline.from_pretrained("someone/model")))
""", "model"),
    "VDMPipeline, from a folder": ("""
from huggingface_hub import snapshot_download
from vdm_diffusers import VDMPipeline
show(digest=digest(VDMPipeline.from_pretrained(snapshot_download("someone/model"))))
""", "model"),
    "VDMPipeline, sharded weights": ("""
from vdm_diffusers import VDMPipeline
show(digest=digest(VDMPipeline.from_pretrained("someone/shards")))
""", "shards"),
    "VDMPipeline, a repository without code files": ("""
from vdm_diffusers import VDMPipeline
show(digest=digest(VDMPipeline.from_pretrained("someone/plain")))
""", "model"),
    "VDMPipeline with Diffusers' own network and scheduler": ("""
from vdm_diffusers import VDMPipeline
pipe = VDMPipeline.from_pretrained("someone/mixed")
show(digest=digest(pipe), stock=type(pipe.unet).__module__.startswith("diffusers."))
""", "mixed"),
    "DiffusionPipeline, package imported, no trust": ("""
import vdm_diffusers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("someone/model")
show(digest=digest(pipe), ours=type(pipe) is vdm_diffusers.VDMPipeline)
""", "model"),
    "DiffusionPipeline, package imported, a repository without code files": ("""
import vdm_diffusers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("someone/plain")
show(digest=digest(pipe), ours=type(pipe) is vdm_diffusers.VDMPipeline)
""", "model"),
    "DiffusionPipeline, package absent, trusted": ("""
without_package()
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("someone/model", custom_pipeline="vdm_diffusers", trust_remote_code=True)
show(digest=digest(pipe), absent="vdm_diffusers" not in sys.modules, levels=pipe.config.num_levels == 17)
""", "model"),
    "DiffusionPipeline, package absent, trusted, from a folder": ("""
without_package()
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
folder = snapshot_download("someone/model")
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="vdm_diffusers", trust_remote_code=True)
show(digest=digest(pipe), absent="vdm_diffusers" not in sys.modules)
""", "model"),
    "components alone": ("""
from diffusers import AutoModel
from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel
scheduler = VDMScheduler.from_pretrained("someone/model", subfolder="scheduler")
unet = VDMUNet2DModel.from_pretrained("someone/model", subfolder="unet")
auto = AutoModel.from_pretrained("someone/model", subfolder="unet")
show(digest=digest(VDMPipeline(unet, scheduler, num_levels=17)), auto=type(auto) is VDMUNet2DModel,
     end_point=scheduler.config.log_snr_max == 11.0)
""", "model"),
    "revision: a tag": ("""
from vdm_diffusers import VDMPipeline
show(digest=digest(VDMPipeline.from_pretrained("someone/model", revision="v1")))
""", "old"),
    "revision: a tag, package absent, trusted": ("""
without_package()
from diffusers import DiffusionPipeline
show(digest=digest(DiffusionPipeline.from_pretrained("someone/model", revision="v1", custom_pipeline="vdm_diffusers",
                                                     trust_remote_code=True)))
""", "old"),
    "variant": ("""
from vdm_diffusers import VDMPipeline
pipe = VDMPipeline.from_pretrained("someone/model", variant="fp16", torch_dtype=torch.float16)
files = {f for _, _, names in os.walk(os.environ["HF_HOME"]) for f in names if f.endswith(".safetensors")}
show(digest=digest(pipe), dtype=pipe.unet.dtype == torch.float16, only=files == {"diffusion_pytorch_model.fp16.safetensors"})
""", "half"),
    "torch_dtype": ("""
from vdm_diffusers import VDMPipeline
pipe = VDMPipeline.from_pretrained("someone/model", torch_dtype=torch.float16)
show(digest=digest(pipe), dtype=pipe.unet.dtype == torch.float16)
""", "half"),
    "device_map": ("""
from vdm_diffusers import VDMPipeline
pipe = VDMPipeline.from_pretrained("someone/model", device_map="balanced")
kept = VDMPipeline.from_pretrained("someone/model", device_map="cpu")
show(digest=digest(pipe), same=digest(kept) == digest(pipe))
""", "model"),
    "LatentVDMPipeline, from the Hub": ("""
from vdm_diffusers import LatentVDMPipeline
show(digest=digest(LatentVDMPipeline.from_pretrained("someone/latent"), output_type="np"))
""", "latent"),
    "DiffusionPipeline of a VAE with a VDM prior, package imported": ("""
import vdm_diffusers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("someone/latent")
show(digest=digest(pipe, output_type="np"), ours=type(pipe) is vdm_diffusers.LatentVDMPipeline)
""", "latent"),
    "a VAE alone": ("""
from vdm_diffusers import LatentVDMPipeline, VariationalAutoencoder
pipe = LatentVDMPipeline.from_pretrained("someone/latent", vae=VariationalAutoencoder.from_pretrained("someone/vae"))
show(digest=digest(pipe, output_type="np"))
""", "latent"),
    "stock DDPMPipeline, package absent": ("""
without_package()
from diffusers import DDPMPipeline
show(digest=digest(DDPMPipeline.from_pretrained("someone/stock"), output_type="np"))
""", "stock"),
    "stock DDPMPipeline with our scheduler, package imported": ("""
import vdm_diffusers
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained("someone/stock-ours")
show(digest=digest(pipe, output_type="np"), ours=type(pipe.scheduler) is vdm_diffusers.VDMScheduler)
""", "stock-ours"),
}  # fmt: skip


@pytest.mark.parametrize("road", ROADS)
def test_road(road, client, made):
    code, expected = ROADS[road]
    shown = client(code)
    assert shown.pop("digest") == made[expected]["digest"]
    assert all(value is True for value in shown.values()), shown


def test_what_was_published_differs(made):
    digests = [made[name]["digest"] for name in ("old", "model", "half", "mixed", "stock", "stock-ours")]
    assert len(set(digests)) >= 5 and made["shards"]["digest"] != made["old"]["digest"]


def test_road_pinned_commit(client, made):
    shown = client(f"""
from vdm_diffusers import VDMPipeline
show(digest=digest(VDMPipeline.from_pretrained("someone/model", revision={made["old"]["commit"]!r})))
""")  # fmt: skip
    assert shown["digest"] == made["old"]["digest"]


OFFLINE = """
from vdm_diffusers import VDMPipeline
from diffusers import DiffusionPipeline
show(digests=[digest(VDMPipeline.from_pretrained("someone/model")),
              digest(VDMPipeline.from_pretrained("someone/model", local_files_only=True)),
              digest(DiffusionPipeline.from_pretrained("someone/model"))],
     missing=error_of(VDMPipeline.from_pretrained, "someone/shards"))
"""


def test_road_offline(hub, made, storage, tmp_path):
    home, xet = tmp_path / "home", storage == "Xet"
    hub.client(home, "from vdm_diffusers import VDMPipeline\nVDMPipeline.from_pretrained('someone/model')", xet=xet)
    asked = len(hub.log)
    shown = hub.client(home, PRELUDE + OFFLINE, xet=xet, HF_HUB_OFFLINE="1")  # read when huggingface_hub is imported
    assert shown["digests"] == [made["model"]["digest"]] * 3
    assert "someone/shards" in shown["missing"]
    assert len(hub.log) == asked


RESAVE = """
without_package()
from diffusers import DiffusionPipeline
trust = {"custom_pipeline": "vdm_diffusers", "trust_remote_code": True}
pipe = DiffusionPipeline.from_pretrained("someone/model", **trust)
pipe.save_pretrained(sys.argv[1])
pipe.push_to_hub("someone/again")
show(digest=digest(pipe))
"""
LOAD_BOTH = """
without_package()
from diffusers import DiffusionPipeline
trust = {"custom_pipeline": "vdm_diffusers", "trust_remote_code": True}
show(digests=[digest(DiffusionPipeline.from_pretrained(where, **trust)) for where in (sys.argv[1], "someone/again")])
"""
LOAD_WITH_PACKAGE = """
from vdm_diffusers import VDMPipeline
show(digests=[digest(VDMPipeline.from_pretrained(where)) for where in (sys.argv[1], "someone/again")])
"""


def test_road_saved_and_published_again_without_the_package(hub, client, made, tmp_path):
    folder = tmp_path / "again"
    client(RESAVE, folder)
    codes = {path.read_text() for path in folder.rglob("*.py")}
    assert len(codes) == 1 and len(list(folder.rglob("*.py"))) == 3
    assert hub.files("someone/again")["vdm_diffusers.py"].decode() in codes
    for code in (LOAD_BOTH, LOAD_WITH_PACKAGE):
        shown = client(code, folder)
        assert shown["digests"] == [made["model"]["digest"]] * 2


UNTRUSTED = """
without_package()
from diffusers import DiffusionPipeline
show(errors=[error_of(DiffusionPipeline.from_pretrained, "someone/marked"),
             error_of(DiffusionPipeline.from_pretrained, "someone/marked", custom_pipeline="vdm_diffusers"),
             error_of(DiffusionPipeline.from_pretrained, "someone/plain")],
     executed=os.path.exists(sys.argv[1]))
"""


def test_road_untrusted_code_is_not_run(hub, client, made, tmp_path):
    marker = tmp_path / "executed"
    files = hub.files("someone/model")
    spy = f"open({str(marker)!r}, 'w').close()\n"
    files = {name: spy.encode() if name.endswith(".py") else data for name, data in files.items()}
    hub.put("someone/marked", files)
    shown = client(UNTRUSTED, marker)
    assert all(shown["errors"]) and "trust_remote_code" in shown["errors"][1]
    assert not shown["executed"]
    # with the package the code files are not even looked at
    client("from vdm_diffusers import VDMPipeline\nVDMPipeline.from_pretrained('someone/marked')")
    assert not marker.exists()


SAME_BEHAVIOUR = """
import importlib.util
from vdm_diffusers import VDMPipeline, VDMScheduler
from vdm_diffusers.hub import travelling_code
path = sys.argv[1] + "/vdm_diffusers.py"
open(path, "w").write(travelling_code())
spec = importlib.util.spec_from_file_location("travelled", path)
module = importlib.util.module_from_spec(spec)
sys.modules["travelled"] = module
with warnings.catch_warnings():
    warnings.simplefilter("error")
    spec.loader.exec_module(module)

theirs, ours = module.VDMPipeline, VDMPipeline
same = {"classes differ": theirs is not ours and module.VDMScheduler is not VDMScheduler}
torch.manual_seed(0)
net = dict(sample_size=5, in_channels=2, hidden_channels=8, layers_per_block=1, norm_num_groups=4, fourier_exponents=(2, 5),
           num_class_embeds=3, dropout=0.0)
import vdm_diffusers
a = vdm_diffusers.VDMUNet2DModel(**net).eval()
for parameter in a.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
b = module.VDMUNet2DModel(**net).eval()
b.load_state_dict(a.state_dict())
for index, config in enumerate([
    {}, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, {"variance_type": "fixed_large"},
    {"beta_schedule": "log_snr_linear"}, {"beta_schedule": "log_snr_cosine", "final_step": "mean"},
    {"beta_schedule": "log_snr_linear", "stochasticity": 0.0, "multistep_order": 2},
]):
    for encoding in ("bin_center", "endpoint"):
        left = ours(a, VDMScheduler(**config), num_levels=17, pixel_encoding=encoding)
        right = theirs(b, module.VDMScheduler(**config), num_levels=17, pixel_encoding=encoding)
        run = {"class_labels": [0, 2], "num_inference_steps": 5}
        same[f"latents {index} {encoding}"] = digest(left, **run) == digest(right, **run)
        same[f"images {index} {encoding}"] = digest(left, **run, output_type="np") == digest(right, **run, output_type="np")
show(**same)
"""


def test_the_code_that_travels_does_what_the_package_does(client, tmp_path):
    shown = client(SAME_BEHAVIOUR, tmp_path)
    assert len(shown) == 1 + 2 * 2 * 6
    assert all(shown.values()), [name for name, value in shown.items() if not value]


def test_published_code_is_generated_and_names_what_it_needs(hub, made):
    files = hub.files("someone/model")
    assert {name for name in files if name.endswith(".py")} == set(CODE_PATHS)
    assert {files[name].decode() for name in CODE_PATHS} == {travelling_code()}
    # Diffusers searches code for imports line by line, docstrings too, and warns of those that it cannot import
    found = re.findall(r"^\s*(?:import\s+(\S+)\s*$|from\s+(\S+)\s+import)", travelling_code(), flags=re.MULTILINE)
    modules = {(plain or source).split(".")[0] for plain, source in found}
    assert "vdm_diffusers" not in modules and {"torch", "diffusers", "huggingface_hub"} <= modules
    assert not re.search(r"^\s*from\s+\.", travelling_code(), flags=re.MULTILINE)
    assert not list(ROOT.glob("model_cards/**/*.py")), "code files are made when publishing, never committed"


def test_the_table_in_the_docs_lists_these_roads():
    table = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`test_road\[(.+?)\]`", table))
    assert named == set(ROADS)
    others = set(re.findall(r"`(test_road_\w+)`", table))
    assert others == {name for name in globals() if name.startswith("test_road_")}
