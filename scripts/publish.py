"""Push every model of model_cards/ to the Hub, each to the repository NAMESPACE/<folder>:
`make publish NAMESPACE=me`.
"""

import argparse
from pathlib import Path

from vdm_diffusers.hub import HUB_ERRORS, publish_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("namespace", help="user or organisation on the Hub")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "model_cards")
    parser.add_argument("--private", action="store_true", help="make new repositories private, refuse public ones")
    parser.add_argument("--tag", help="name of the commits, such as v1.0")
    args = parser.parse_args()
    models = sorted(path.parent for path in args.folder.glob("*/model_index.json"))
    if not models:
        parser.error(f"{args.folder} holds no folder with a model_index.json")
    for model in models:
        repo_id = f"{args.namespace}/{model.name}"
        try:
            commit = publish_folder(
                model, repo_id, private=args.private or None, tag=args.tag, commit_message="Publish"
            )
        except HUB_ERRORS as error:
            parser.error(f"{repo_id} was not published: {error}")
        print(f"{repo_id}: {commit.oid}")


if __name__ == "__main__":
    main()
