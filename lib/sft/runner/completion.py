"""make completion: a bash script that completes Make's goals, variables, recipes, clusters, runs and fields here. Standard library only.

    source <(make -s completion)       bash, and zsh after `autoload -U +X bashcompinit && bashcompinit`

It completes in this checkout only; anywhere else Make keeps the completion that it had. Recipes, clusters and runs are looked up
when a word is completed; goals and fields are those of the moment when the script was printed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from sft.recipe import schema
from sft.recipe.options import names_of

_SCRIPT = r"""# olmo-sft: completion of make in {root}
_olmo_sft_make() {{
    local root={root} word="${{COMP_WORDS[COMP_CWORD]}}" line="${{COMP_LINE:0:COMP_POINT}}"
    line="${{line##* }}"
    COMPREPLY=()
    if [ "$(pwd -P)" != "$root" ]; then
        type _make >/dev/null 2>&1 && _make "$@"
        return
    fi
    local values=""
    case "$line" in
    RECIPE=* | FROM=*) values=$(cd "$root/recipes" && printf '%s\n' *.toml) ;;
    CLUSTER=*) values=$(cd "$root/env" && printf '%s\n' *.toml) ;;
    RUN=* | A=* | B=* | C=*) values=$(cd "$root/runs" 2>/dev/null && printf '%s\n' */ | tr -d /) ;;
    MODEL=*) values=$(cd "$root" && for one in 'runs/*/train/step*' 'runs/*/convert'; do compgen -G "$one"; done) ;;
    STAGE=*) values={stages} ;;
{choices}
    *=*) return ;;
    *)
        mapfile -t COMPREPLY < <(compgen -W {words} -- "$word")
        [[ "${{COMPREPLY[*]}}" != *= ]] || compopt -o nospace 2>/dev/null
        return
        ;;
    esac
    [ "$word" != "=" ] || word=""
    mapfile -t COMPREPLY < <(compgen -W "${{values//.toml/}}" -- "${{word#*=}}")
}}
complete -o default -F _olmo_sft_make make"""


def script(root: Path, goals: Iterable[str], variables: Iterable[str]) -> str:
    """The script for the checkout in `root`."""
    fields: dict[str, tuple[str, ...]] = {}
    for cls in (*schema.TABLES.values(), schema.Hardware):
        for name, f in names_of(cls).items():
            choices = f.metadata["choices"] or (("true", "false") if f.type == "bool" else ())
            fields[name] = tuple(dict.fromkeys((*fields.get(name, ()), *choices)))
    words = [*goals, *(f"{v}=" for v in variables), *(f"{name}=" for name in fields)]
    lines = [f"    {name}=*) values={shlex.quote(' '.join(found))} ;;" for name, found in fields.items() if found]
    return _SCRIPT.format(
        root=shlex.quote(str(root.resolve())),
        stages=shlex.quote(" ".join(schema.STAGES)),
        choices="\n".join(lines),
        words=shlex.quote(" ".join(words)),
    )
