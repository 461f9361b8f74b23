"""A student on the Hugging Face hub: its plain folder and a model card, in one commit."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from maskclip_jax.data.whole_files import cut, reason
from maskclip_jax.distill import CONFIG, WEIGHTS, is_plain
from maskclip_jax.distill.predict import TrainedStudent
from maskclip_jax.distill.student_folder import load_student, read_student, save_student
from maskclip_jax.errors import UserError

CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push(folder: str | Path, name: str, *, license: str = "unknown", private: bool = False, token: Any = None) -> str:
    """Puts a student on the hub as `name`, "owner/name", and returns its address; `load_student(name)` reads it.

    Args:
      folder: a run's, or a plain one; a README.md in the latter goes along in the card's place.
      license: of the weights, as the hub names licences ("apache-2.0"); "unknown" says that none was stated.
      private: make a new repository private; one that exists stays what it is.
      token: None is that of `hf auth login` or $HF_TOKEN.

    Raises:
      UserError: no student there, no such name, no token, no network, or the hub refuses. Files arrive in one commit.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if not _NAME.fullmatch(name):
        raise UserError(f"a hub id is OWNER/NAME, letters, digits and . _ - in each, got {cut(name)}: correct it")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"what is pushed is a student's folder, but {folder} is none: `convert` makes one of a run")
    token = token or get_token()
    if not token:
        raise UserError("the hub wants to know who you are, but no token is here: run `hf auth login`, or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise UserError("the hub must be reached, but HF_HUB_OFFLINE is set: unset it")
    with tempfile.TemporaryDirectory() as temporary:
        plain = folder if is_plain(folder) else save_student(load_student(folder), Path(temporary) / "student")
        trained, card = read_student(plain), plain / CARD
        text = card.read_bytes() if card.is_file() else model_card(trained, name, license).encode()
        files = {CONFIG: plain / CONFIG, WEIGHTS: plain / WEIGHTS, CARD: text}
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        try:
            api = HfApi(token=token)
            address = api.create_repo(name, private=private, exist_ok=True)
            api.create_commit(name, operations, commit_message=f"{trained.origin} of {folder.name}")
        except Exception as error:  # the network's, the hub's and the client's own, some thirty kinds
            why = f"{type(error).__name__}: {reason(error.__cause__ or error)}"
            raise UserError(
                f"the hub did not take {name} ({why}): check the network, the name, and that the token may write there"
            ) from error
    return str(address)


def model_card(trained: TrainedStudent, name: str, license: str = "unknown") -> str:
    """The README.md of a plain folder's student: what the hub shows."""
    config, scores = trained.config, trained.scores or {}
    student = config.student
    head = ["---", f"license: {json.dumps(license)}", "library_name: maskclip-jax", "pipeline_tag: image-segmentation"]
    head += ["tags: [maskclip, semantic-segmentation, jax, flax]", "---", ""]
    lines = [f"# {name.partition('/')[2]}", ""]
    lines += [
        f"A {student.head} on a {student.backbone} ({student.stem} stem) that names each pixel as one of "
        f"{len(config.label_names)} classes: a student of MaskCLIP+ ([paper](https://arxiv.org/abs/2112.01071)), by "
        "maskclip_jax.",
        "",
        "```python",
        "import maskclip_jax",
        "",
        f'student = maskclip_jax.load_student("{name}")',
        '(result,) = maskclip_jax.segment_images(["photo.jpg"], None, student)',
        "```",
        "",
        f"**Classes.** {', '.join(config.label_names)}",
        "",
        f"**Teacher.** {_teacher(config)}",
        "",
        f"**Training.** {config.mode}, {trained.step} of {config.steps} steps of {config.batch_size} crops of "
        f"{config.crop_size} px, on {config.train_data or 'data that is not named'}; {config.optimizer}, learning rate "
        f"{config.learning_rate:g}. The whole config is in `{CONFIG}` (`run`). Checkpoint: {trained.origin}.",
        "",
        *_scores(scores, config.eval_data),
        "",
        f"**Licence.** {'Not stated.' if license == 'unknown' else license} The teacher's weights and the images that "
        "it was trained on have licences of their own.",
        "",
    ]
    return "\n".join(head + lines)


def _teacher(config: Any) -> str:
    teacher = config.teacher
    if not (config.uses_pseudo_labels or config.mode in ("feature", "finetuned-clip")):
        return f"None: trained on annotation; the classifier is the text embeddings of {teacher.model}."
    changed = ", ".join(f"{name} {value}" for name, value in teacher.changed().items())
    unseen = f" Without annotation: {', '.join(config.unseen)}." if config.unseen else ""
    return f"{teacher.model} ({teacher.fidelity} fidelity{', ' * bool(changed)}{changed}).{unseen}"


def _scores(scores: dict[str, Any], data: str) -> list[str]:
    numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
    if not numbers:
        return ["**Scores.** Not evaluated."]
    how = ", ".join(f"{name} {value}" for name, value in scores.get("protocol", {}).items())
    table = [f"| {' | '.join(numbers)} |", "|" + "---:|" * len(numbers)]
    table += [f"| {' | '.join(f'{value:.1f}' for value in numbers.values())} |"]
    return [f"**Scores** in %, on {scores.get('images', 'the')} images of {data or 'its data'}: {how}", "", *table]
