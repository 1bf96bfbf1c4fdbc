"""Publishing: pushes over HTTP that break, queue and collide; who may; what is left behind; cards that can be
believed.
"""

import ast
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_double import HubDouble
from huggingface_hub import ModelCard
from warm_client import WarmClient

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel
from vdm_diffusers.hub import (
    EvaluationData,
    Measurement,
    ModelDescription,
    Provenance,
    model_location,
    publish_folder,
    redact,
    write_model_card,
)
from vdm_diffusers.hub import cards as vdm_cards

ROOT = Path(__file__).resolve().parent.parent
SECRET = "hf_" + "aB3" * 10

PRELUDE = """
import json, sys
from vdm_diffusers import VDMPipeline
from vdm_diffusers.hub import check_hub_access, publish_folder
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


@pytest.fixture
def folder(tmp_path) -> Path:
    return saved(tmp_path / "run")


def saved(folder: Path, seed: int = 0, **kwargs) -> Path:
    torch.manual_seed(seed)
    unet = VDMUNet2DModel(sample_size=6, in_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4)
    torch.nn.init.normal_(unet.conv_out.weight)
    VDMPipeline(unet, VDMScheduler(beta_schedule="log_snr_linear"), num_levels=17).save_pretrained(folder, **kwargs)
    return folder


def provenance(**changes) -> Provenance:
    return replace(Provenance.of_this_run(seed=3, command="python training/evaluate.py --checkpoint here"), **changes)


def measurement(**changes) -> Measurement:
    data = EvaluationData("Digits", "sklearn/digits", "1.6.0", "test", num_images=297)
    return replace(
        Measurement(
            1.62345, 0.004, 0.008, "ELBO in continuous time", True, None, 13.3, -5.0, 4752, data, provenance(),
            prior=0.01, diffusion=1.6, reconstruction=0.01345,
        ),
        **changes,
    )  # fmt: skip


def description(**changes) -> ModelDescription:
    return replace(
        ModelDescription(
            title="Digits by ELBO", summary="A small model of digits.", license="apache-2.0", training="With Adam.",
            training_data=[], provenance=provenance(), duration="4 min", measurements=[measurement()],
            limitations=["It has seen 1200 images."], location="model_cards/digits-elbo", num_inference_steps=3,
        ),
        **changes,
    )  # fmt: skip


# --- pushing ---------------------------------------------------------------------------------------------------------


def test_push_twice_is_one_commit_and_leaves_the_rest_behind(hub, client, folder):
    for name in (
        "optimizer.bin",
        "log.txt",
        "state.json",
        "checkpoint-10/optimizer.pt",
        "checkpoint-10/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for others")
    (folder / "samples.png").write_bytes(b"\x89PNG")
    oids = client("""
kwargs = {"private": True, "tag": "v1", "commit_message": "First"}
show([publish_folder(sys.argv[1], "run", **kwargs).oid, publish_folder(sys.argv[1], "someone/run", **kwargs).oid])
""", folder)  # fmt: skip
    (commit, _) = hub.commits("someone/run")
    assert oids == [commit.oid] * 2 and commit.title == "First" and hub.repos["someone/run"].private
    assert set(hub.files("someone/run", "v1")) == {
        ".gitattributes", "README.md", "model_index.json", "samples.png", "scheduler/scheduler_config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vdm_diffusers.py", "unet/vdm_diffusers.py", "scheduler/vdm_diffusers.py",
    }  # fmt: skip
    assert hub.repos["someone/run"].at("main").files["unet/diffusion_pytorch_model.safetensors"].lfs


def test_branches_tags_and_pull_requests(hub, client, tmp_path):
    first, second = saved(tmp_path / "1", seed=1), saved(tmp_path / "2", seed=2)
    shown = client("""
one = publish_folder(sys.argv[1], "someone/refs", tag="v1")
two = publish_folder(sys.argv[2], "someone/refs", revision="trial")
taken = error_of(publish_folder, sys.argv[2], "someone/refs", tag="v1", revision="trial")
request = publish_folder(sys.argv[2], "someone/refs", create_pr=True)
show([one.oid, two.oid, taken, request.pr_revision])
""", first, second)  # fmt: skip
    weights = "unet/diffusion_pytorch_model.safetensors"
    at = {ref: hub.files("someone/refs", ref)[weights] for ref in ("main", "v1", "trial", shown[3])}
    ones, twos = ((path / weights).read_bytes() for path in (first, second))
    assert at == {"main": ones, "v1": ones, "trial": twos, shown[3]: twos}
    assert shown[2].startswith("ValueError: `tag` 'v1' exists")
    assert hub.commits("someone/refs", "trial")[0].oid == shown[1]


@pytest.mark.parametrize(
    "fault",
    [
        {"match": "PUT /cdn/", "status": 500, "times": 20},
        {"match": "PUT /cdn/", "drop_upload_after": 100, "times": 20},
        {"match": "POST .*/commit/", "status": 500, "times": 20},
    ],
    ids=["500 while uploading", "connection dropped", "500 at the commit"],
)
def test_a_broken_push_is_resumed_by_pushing_again(fault, hub, client, tmp_path):
    name = f"someone/broken-{fault['match'][:4].strip()}-{fault.get('status', 'drop')}"
    folder = saved(tmp_path / "run", seed=hash(name) % 1000)
    hub.faults.clear()
    armed = hub.fail_next(**fault)
    broken = client(
        "import time\ntime.sleep = lambda seconds: None\nshow(error_of(publish_folder, sys.argv[1], sys.argv[2]))",
        folder,
        name,
    )
    assert broken and armed.hits and len(hub.commits(name)) == 1
    hub.faults.clear()
    puts = len(hub.requests("PUT /cdn/"))
    client("publish_folder(sys.argv[1], sys.argv[2])", folder, name)
    assert hub.files(name)["model_index.json"] == (folder / "model_index.json").read_bytes()
    assert len(hub.commits(name)) == 2
    again = len(hub.requests("PUT /cdn/")) - puts
    assert again == (0 if "commit" in fault["match"] else 1)  # what has arrived is not sent again


@pytest.mark.parametrize(
    "fault", [{"status": 429, "retry_after": 1}, {"status": 503}, {"drop_upload_after": 50}], ids=str
)
def test_a_fault_that_passes_is_not_noticed(fault, hub, client, tmp_path):
    name = f"someone/passing-{fault.get('status', 'drop')}"
    hub.faults.clear()
    armed = hub.fail_next("PUT /cdn/", times=1, **fault)
    client(
        "publish_folder(sys.argv[1], sys.argv[2])", saved(tmp_path / "run", seed=len(name) + sum(fault.values())), name
    )
    assert armed.hits == 1 and len(hub.commits(name)) == 2


def test_pushes_in_the_background_do_not_wait_keep_their_order_and_what_they_were_given(hub, client, tmp_path):
    """While the first upload hangs, training overwrites the folder and pushes again."""
    versions = [saved(tmp_path / str(seed), seed=seed) for seed in (5, 6)]
    hub.faults.clear()
    hub.fail_next("POST .*/commit/", delay=1.5)
    shown = client("""
import glob, shutil, tempfile, time
folder = sys.argv[3]
start, futures = time.time(), []
for version in sys.argv[1:3]:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(version, folder)
    futures.append(publish_folder(folder, "someone/future", commit_message=version[-1], run_as_future=True))
returned = time.time() - start
done = [future.done() for future in futures]
shutil.rmtree(folder)
commits = [future.result().oid for future in futures]
show([returned, done, commits, glob.glob(tempfile.gettempdir() + "/vdm-diffusers-*")])
""", *versions, tmp_path / "live", TMPDIR=str(tmp_path))  # fmt: skip
    returned, done, oids, left = shown
    assert returned < 1.5 and done == [False, False] and left == []
    second, first, _ = hub.commits("someone/future")
    assert [first.oid, second.oid] == oids and (first.title, second.title) == ("5", "6")
    weights = "unet/diffusion_pytorch_model.safetensors"
    for oid, version in zip(oids, versions, strict=True):
        assert hub.files("someone/future", oid)[weights] == (version / weights).read_bytes()


def test_who_may_push_where(hub, client, folder):
    stranger, member = hub.add_user("stranger"), hub.add_user("member", orgs=("lab",))
    hub.put("someone/public", {"a.txt": "a"})
    code = "show([error_of(check_hub_access, name, private=True) for name in sys.argv[1:]])"
    assert client(code, "someone/public")[0].startswith("PermissionError: a private repository was asked for")
    assert client(code, "someone/new", HF_TOKEN=stranger)[0].startswith("PermissionError: stranger may not push")
    assert client(code, "lab/new", HF_TOKEN=member) == [""] and hub.repos["lab/new"].private
    assert "may only read" in client(code, "someone/new", HF_TOKEN=hub.read_token)[0]
    assert "someone/new" not in hub.repos
    wrong = client(code, "someone/new", HF_TOKEN="hf_" + "wrong" * 6)[0]
    assert wrong.startswith("HfHubHTTPError") and "Invalid user token" in wrong
    nobody = hub.client(folder.parent / "nobody", PRELUDE + code, "someone/new", token=None)
    assert nobody[0].startswith("LocalTokenNotFoundError")
    assert client("show(check_hub_access('fresh'))") == "someone/fresh"


def test_the_errors_of_loading_that_users_know(hub, client, folder):
    hub.put("someone/there", {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")})
    hub.put("someone/hidden", {"a.txt": "a"}, private=True)
    stranger = hub.add_user("visitor")
    code = "show([error_of(VDMPipeline.from_pretrained, a[0], revision=a[1]) for a in json.loads(sys.argv[1])])"
    asked = json.dumps([["someone/none", None], ["someone/there", "v9"], ["someone/hidden", None]])
    none, revision, hidden = client(code, asked, HF_TOKEN=stranger)
    assert none.startswith("RepositoryNotFoundError") and hidden.startswith("RepositoryNotFoundError")
    assert revision.startswith("RevisionNotFoundError")
    assert client(code, json.dumps([["someone/a/b", None]]))[0].startswith("FileNotFoundError: there is no folder")


def test_a_truncated_download_is_noticed(hub, client, folder):
    hub.put("someone/short", {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")})
    hub.faults.clear()
    hub.fail_next("GET /cdn/", truncate_to=100, times=20)
    error = client("show(error_of(VDMPipeline.from_pretrained, 'someone/short'))")
    hub.faults.clear()
    assert error
    assert client("show(error_of(VDMPipeline.from_pretrained, 'someone/short'))", fresh=False) == ""


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "unet/config.json", "model_index.json"])
def test_a_token_in_a_file_stops_the_push(name, folder):
    text = (folder / name).read_text() if (folder / name).exists() else "{}"
    (folder / name).write_text(text.replace("}", f', "token": "{SECRET}"}}', 1))
    with pytest.raises(ValueError, match="access token"):
        publish_folder(folder, "someone/leak")


def test_the_token_in_use_is_found_whatever_it_looks_like(folder):
    (folder / "README.md").write_text("my password is swordfish-1")
    with pytest.raises(ValueError, match="access token"):
        publish_folder(folder, "someone/leak", token="swordfish-1")


def test_tokens_in_commands_are_blotted_out(folder):
    commands = [f"train.py --hub_token {SECRET}", "train.py --hub_token=abc", f"HF_TOKEN={SECRET} train.py"]
    for command in commands:
        assert SECRET not in redact(command) and "abc" not in redact(command)
    assert redact("train.py --num_tokens 5 --hub_token --push") == "train.py --num_tokens 5 --hub_token --push"
    record = provenance(command=commands[0])
    text = write_model_card(folder, description(provenance=record, training=f"I used {SECRET}.")).read_text()
    assert SECRET not in text and "--hub_token ***" in text


def test_nothing_of_a_push_prints_the_token(hub, folder, tmp_path):
    import logging
    import subprocess
    import sys

    code = PRELUDE + "import logging\nlogging.basicConfig(level=0)\npublish_folder(sys.argv[1], 'someone/loud')"
    env = hub.env(tmp_path / "home") | {"HF_DEBUG": "", "DIFFUSERS_VERBOSITY": "debug"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert logging.DEBUG and hub.token not in done.stdout + done.stderr
    assert not [name for name, data in hub.files("someone/loud").items() if hub.token.encode() in data]


# --- cards -----------------------------------------------------------------------------------------------------------


def test_the_model_index_holds_the_figure_and_all_that_belongs_to_it(folder):
    card = ModelCard.load(write_model_card(folder, description()))
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_type, result.dataset_split) == (1.62345, "sklearn/digits", "test")
    assert (result.dataset_revision, result.metric_type) == (None, "bits_per_dim")  # "1.6.0" is no commit
    assert result.metric_args["data_version"] == "1.6.0"
    expected = {
        "standard_error": 0.004, "sampling_error": 0.008, "method": "ELBO in continuous time", "is_bound": True, "num_steps": "continuous time",
        "log_snr_max": 13.3, "log_snr_min": -5.0, "num_images": 297, "num_model_evaluations": 4752, "seed": 3,
        "command": "python training/evaluate.py --checkpoint here",
    }  # fmt: skip
    assert {name: result.metric_args[name] for name in expected} == expected
    assert {"versions", "machine", "date"} <= result.metric_args.keys()
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "diffusers"
    assert "≤ 1.6235 ± 0.0089" in card.text and "0.0100 + 1.6000 + 0.0135" in card.text
    for heading in ("## Likelihood", "## Usage", "## Training", "## Limitations"):
        assert heading in card.text


@pytest.mark.parametrize("field", [f.name for f in fields(Measurement)][:11])
def test_a_figure_without_its_provenance_cannot_be_written(field):
    known = {f.name: getattr(measurement(), f.name) for f in fields(Measurement)}
    with pytest.raises(TypeError, match=field):
        Measurement(**{name: value for name, value in known.items() if name != field})
    if field not in ("is_bound", "num_steps", "num_model_evaluations"):
        with pytest.raises(ValueError, match=field):
            measurement(**{field: None})


@pytest.mark.parametrize(
    "make",
    [
        lambda: provenance(command=" "),
        lambda: provenance(machine=""),
        lambda: provenance(date=None),
        lambda: provenance(seed=None),
        lambda: provenance(versions={"torch": "2"}),
        lambda: replace(measurement().data, version=""),
        lambda: replace(measurement().data, split=None),
        lambda: replace(measurement().data, num_images=0),
        lambda: measurement(bits_per_dim=float("nan")),
        lambda: measurement(standard_error=-1.0),
        lambda: measurement(provenance="trust me"),
        lambda: description(measurements=[1.62]),
        lambda: description(provenance=None),
        lambda: description(license=""),
        lambda: description(limitations=[]),
    ],
)
def test_what_a_card_must_know(make):
    with pytest.raises(ValueError, match="`"):
        make()


def test_pictures_of_a_card_must_exist(folder):
    with pytest.raises(ValueError, match=r"samples\.png"):
        write_model_card(folder, description(images={"samples.png": "Samples"}))
    (folder / "samples.png").write_bytes(b"\x89PNG")
    assert (
        "![Samples](samples.png)"
        in write_model_card(folder, description(images={"samples.png": "Samples"})).read_text()
    )


def code_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)


def test_the_code_of_a_card_runs_as_printed_from_the_folder(client, tmp_path):
    folder = saved(tmp_path / "model_cards" / "digits-elbo")
    blocks = code_blocks(write_model_card(folder, description()).read_text())
    assert len(blocks) == 2 and all('"model_cards/digits-elbo"' in block for block in blocks[:1])
    code = "\n".join(blocks)
    client(
        f"import os\nos.chdir({str(tmp_path)!r})\n{code}\nassert len(images) == 8 and report.bits_per_dim > 0\nshow(0)"
    )


def test_the_code_of_a_published_card_runs_as_printed(hub, client, tmp_path):
    folder = saved(tmp_path / "run")
    write_model_card(folder, description())
    client("publish_folder(sys.argv[1], 'someone/carded')", folder)
    card = hub.files("someone/carded")["README.md"].decode()
    assert "model_cards/" not in card and card.count('from_pretrained("someone/carded"') == 2
    *ours, alone = code_blocks(card)
    client("\n".join(ours) + "\nassert report.bits_per_dim > 0\nshow(0)")
    absent = "sys.modules['vdm_diffusers'] = None"
    # the prelude imports the package, so the block that does without runs on its own
    hub.client(tmp_path / "alone", f"import sys\n{absent}\n{alone}\nassert len(images) == 4")
    figures = (folder / "README.md").read_text().split("## Usage")[0]
    assert card.startswith(figures)


def test_classes_are_in_the_code_of_the_card(tmp_path):
    unet = VDMUNet2DModel(
        sample_size=6, in_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4, num_class_embeds=3
    )
    VDMPipeline(unet, VDMScheduler(beta_schedule="log_snr_linear")).save_pretrained(tmp_path)
    blocks = code_blocks(write_model_card(tmp_path, description(location=str(tmp_path))).read_text())
    names: dict = {}
    for block in blocks:
        exec(compile(ast.parse(block), "<card>", "exec"), names)
    assert len(names["images"]) == 8 and names["report"].bits_per_dim > 0


def test_a_card_of_ones_own_is_kept_and_a_missing_one_is_made(hub, client, folder):
    client("publish_folder(sys.argv[1], 'someone/short-card')", folder)
    made = ModelCard(hub.files("someone/short-card")["README.md"].decode())
    assert made.data.to_dict()["library_name"] == "diffusers" and not made.data.eval_results
    own = "---\nlicense: mit\n---\n# Mine\n"
    hub.put("someone/short-card", {"README.md": own})
    client("publish_folder(sys.argv[1], 'someone/short-card')", folder)
    assert hub.files("someone/short-card")["README.md"].decode() == own


def test_a_pipeline_of_diffusers_is_published_as_what_it_is(hub, client, tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=4)).save_pretrained(tmp_path)
    client("publish_folder(sys.argv[1], 'someone/stock')", tmp_path)
    files = hub.files("someone/stock")
    assert not [name for name in files if name.endswith(".py")]
    (block,) = code_blocks(files["README.md"].decode())
    client(block.replace("batch_size=4", "batch_size=4, num_inference_steps=2") + "\nassert len(images) == 4")


def test_the_pipeline_publishes_itself_with_a_card(hub, client):
    client("""
import torch
sys.path.insert(0, sys.argv[1])
import test_hub
pipe = VDMPipeline(test_hub.VDMUNet2DModel(sample_size=6, in_channels=1, hidden_channels=8, layers_per_block=1,
                   norm_num_groups=4), test_hub.VDMScheduler(beta_schedule="log_snr_linear"), num_levels=17)
pipe.push_to_hub("someone/itself", card=test_hub.description(), tag="v1", private=True)
""", ROOT / "tests")  # fmt: skip
    card = ModelCard(hub.files("someone/itself", "v1")["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 1.62345
    assert hub.repos["someone/itself"].private


# --- the namespace ---------------------------------------------------------------------------------------------------


def test_one_constant_says_where_the_models_are(monkeypatch):
    assert model_location("digits-elbo") == "model_cards/digits-elbo" or vdm_cards.HUB_NAMESPACE
    monkeypatch.setattr(vdm_cards, "HUB_NAMESPACE", "someone")
    assert model_location("digits-elbo") == "someone/digits-elbo"


def test_publish_all_model_cards(hub, client, tmp_path):
    for seed, name in enumerate(("one", "two")):
        write_model_card(
            saved(tmp_path / "model_cards" / name, seed=seed), description(location=f"model_cards/{name}")
        )
    (tmp_path / "model_cards" / "README.md").write_text("not a model")
    command = """
import runpy
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
show(0)
"""
    for _ in range(2):
        client(command, ROOT / "scripts" / "publish.py", "someone", "--folder", tmp_path / "model_cards", "--private")
    for name in ("one", "two"):
        assert len(hub.commits(f"someone/{name}")) == 2
        assert hub.repos[f"someone/{name}"].private
        assert f'from_pretrained("someone/{name}")' in hub.files(f"someone/{name}")["README.md"].decode()
