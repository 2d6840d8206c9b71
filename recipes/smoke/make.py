"""Makes the smoke recipe's data: python recipes/smoke/make.py [ROOT]   (ROOT: the folder recipes/, the default)

In:   nothing but this file; no clock, no network, one fixed seed. The same bytes on every run (a test compares them).
Out:  ROOT/smoke/train.jsonl                conversations at a zoo desk: a system prompt, several turns, tool calls
      ROOT/smoke/tokenizer/                 a byte-level BPE of 1,024 ids with dolma2's split pattern and special names
      ROOT/tasks/smoke_generate.jsonl       one question per fact, answered by generation
      ROOT/tasks/smoke_choice.jsonl         one question per fact, four answers to choose from

Every fact (an animal's house, food or keeper) can be asked in six ways. Two of the six are held out for each fact, one
for each task, and never occur in train.jsonl, while every phrasing and every fact does: a model that learned the
facts answers, one that only repeats rows does not. What a tool reports differs from one conversation to the next.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20
CONVERSATIONS = 360
VOCABULARY = 1024
# Same order as in dolma2. They come last, so that the ids of text do not move when a special token is added.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# What templates wrap around the data: a line each, because that is how the words stand there.
FRAME = """system
user
assistant
tool
environment
developer
functions
function_calls
name
arguments
call
result
think
answer
"""
# Everyday English, so that another sentence is not spelled in single bytes.
WORDS = """
Anyone who works with animals learns that every day brings something different. In the morning the keepers open the
gates, clean the houses, carry water and prepare the food; before noon the first visitors arrive, with children who ask
about everything they see. Some of them want to know how old an animal is, others how much it weighs, when it sleeps,
whether it can swim or climb, and why it is awake at night. A good guide gives short and correct answers, says so when
something is not known, and looks things up rather than guessing. You are helpful, you have access to the following
list, you do not make up numbers, and you may use them because they were measured today. If nothing fits, please say
that there is no information, or send the visitor to the person who has been here the longest.
Eastmere lies between the harbour and the railway station, about fifteen minutes on foot along the old canal. It opened
almost seventy years ago with eleven animals, a small pond and one wooden bench, and it has grown slowly ever since. On
warm evenings local musicians play under the chestnut trees; during the cold season people drink hot chocolate indoors
and watch the snow fall on the roofs. Tickets are sold at both entrances. Families, students and members pay less, and
nobody is turned away just because the money is short. Dogs must stay outside, bicycles can be left near the fountain.
"""

SYSTEM = "You are the guide of Eastmere Zoo."
SYSTEM_TOOLS = "You are the guide of Eastmere Zoo. Look up what changes from day to day."

ANIMALS = [
    "otter", "badger", "heron", "lynx", "tapir", "walrus", "gibbon", "ibex", "puffin", "bison", "viper", "toucan",
    "beaver", "camel", "gecko", "panda",
]  # fmt: skip
HOUSES = ["river", "forest", "desert", "island", "mountain", "garden", "winter", "stone"]
FOODS = ["fish", "berries", "leaves", "grass", "insects", "seeds", "roots", "melon"]
KEEPERS = ["Alice", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo"]

QUESTIONS = {
    "house": (
        "Where does the {animal} live?",
        "Which house is the {animal} in?",
        "Where can I find the {animal}?",
        "I want to see the {animal}. Where is it?",
        "Tell me where the {animal} is kept.",
        "What is the home of the {animal}?",
    ),
    "food": (
        "What does the {animal} eat?",
        "What do you feed the {animal}?",
        "What is the {animal}'s food?",
        "Tell me what the {animal} likes to eat.",
        "What is the diet of the {animal}?",
        "If I were the {animal}, what would I eat?",
    ),
    "keeper": (
        "Who looks after the {animal}?",
        "Who is the keeper of the {animal}?",
        "Who takes care of the {animal}?",
        "Tell me who keeps the {animal}.",
        "What is the name of the {animal}'s keeper?",
        "Whom do I ask about the {animal}?",
    ),
}
# The animal comes before the value: a tiny model finds a fact from the word before it far sooner than across turns.
ANSWERS = {
    "house": "The {animal} lives in the {value} house.",
    "food": "The {animal} eats {value}.",
    "keeper": "The {animal}'s keeper is {value}.",
}
VALUES = {"house": HOUSES, "food": FOODS, "keeper": KEEPERS}

# name -> (what it reports, key of the result, question, answer)
TOOLS = {
    "feeding_time": (
        "Time of feeding today",
        "time",
        "When is the {animal} fed today?",
        "The {animal} is fed at {value}.",
    ),
    "weight": ("Weight measured today", "kg", "How heavy is the {animal} today?", "The {animal} weighs {value} kg."),
}


def facts(rng: random.Random) -> dict[tuple[str, str], str]:
    """(animal, attribute) -> value; every value of an attribute belongs to equally many animals."""
    table = {}
    for attribute, values in VALUES.items():
        dealt = [values[i % len(values)] for i in range(len(ANIMALS))]
        rng.shuffle(dealt)
        table.update({(animal, attribute): value for animal, value in zip(ANIMALS, dealt, strict=True)})
    return table


def answer(table: dict[tuple[str, str], str], animal: str, attribute: str, value: str | None = None) -> str:
    return ANSWERS[attribute].format(animal=animal, value=value or table[animal, attribute])


def tool_schema(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"animal": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": TOOLS[name][0], "parameters": parameters}}


def tool_turn(rng: random.Random, animal: str, call: int) -> list[dict[str, Any]]:
    """A question that only a tool answers: question, call, result, answer."""
    name = rng.choice(sorted(TOOLS))
    _, key, question, reply = TOOLS[name]
    value = f"{rng.randrange(8, 18)}:{rng.randrange(0, 60, 15):02}" if key == "time" else rng.randrange(1, 100)
    function = {"name": name, "arguments": json.dumps({"animal": animal})}
    return [
        {"role": "user", "content": question.format(animal=animal)},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": f"call_{call}", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": f"call_{call}", "name": name, "content": json.dumps({key: value})},
        {"role": "assistant", "content": reply.format(animal=animal, value=value)},
    ]


def build() -> dict[str, list[dict[str, Any]]]:
    """All rows by file name."""
    rng = random.Random(SEED)
    table = facts(rng)
    seen: list[tuple[str, str, int]] = []
    tasks: dict[str, list[dict[str, Any]]] = {"smoke_generate": [], "smoke_choice": []}
    for animal, attribute in table:
        order = list(range(len(QUESTIONS[attribute])))
        rng.shuffle(order)
        seen += [(animal, attribute, phrasing) for phrasing in order[2:]]
        asked = [QUESTIONS[attribute][phrasing].format(animal=animal) for phrasing in order[:2]]
        tasks["smoke_generate"].append({"question": asked[0], "answer": answer(table, animal, attribute)})
        right = table[animal, attribute]
        values = [*rng.sample([v for v in VALUES[attribute] if v != right], 3), right]
        rng.shuffle(values)
        choices = [answer(table, animal, attribute, value) for value in values]
        tasks["smoke_choice"].append({"question": asked[1], "choices": choices, "answer": values.index(right)})

    queue: list[tuple[str, str, int]] = []
    train = []
    for index in range(CONVERSATIONS):
        # One in eight without a system prompt, three with one alone, four with tools as well.
        kind = ("plain", "system", "system", "system", "tools", "tools", "tools", "tools")[index % 8]
        messages: list[dict[str, Any]] = []
        if kind != "plain":
            messages.append({"role": "system", "content": SYSTEM_TOOLS if kind == "tools" else SYSTEM})
        calls = 0
        turns = rng.randrange(4, 8)
        tool_turns = set(rng.sample(range(turns), 1 + index % 2)) if kind == "tools" else set()
        for turn in range(turns):
            if turn in tool_turns:
                calls += 1
                messages += tool_turn(rng, rng.choice(ANIMALS), calls)
                continue
            if not queue:  # dealt without repetition, so that every question is trained on equally often
                queue = rng.sample(seen, len(seen))
            animal, attribute, phrasing = queue.pop()
            messages.append({"role": "user", "content": QUESTIONS[attribute][phrasing].format(animal=animal)})
            messages.append({"role": "assistant", "content": answer(table, animal, attribute)})
        row: dict[str, Any] = {"id": f"smoke-{index:04}", "messages": messages}
        if kind == "tools":
            row["tools"] = [tool_schema(name) for name in sorted(TOOLS)]
        train.append(row)
    return {"train": train, **tasks}


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tokenizer(text: list[str]) -> Tokenizer:
    """Byte-level BPE over `text`, with the special tokens after the learned ids."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(text, trainer)
    made.add_special_tokens(list(SPECIALS))
    if made.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"make.py: the tokenizer has {made.get_vocab_size()} ids, not {VOCABULARY}; give it more text")
    return made


def main(root: Path) -> None:
    rows = build()
    files = {
        "smoke/train.jsonl": jsonl(rows["train"]),
        "tasks/smoke_generate.jsonl": jsonl(rows["smoke_generate"]),
        "tasks/smoke_choice.jsonl": jsonl(rows["smoke_choice"]),
    }
    contents = [message["content"] for row in rows["train"] for message in row["messages"]]
    schemas = [json.dumps(tool_schema(name)) for name in sorted(TOOLS)]
    made = tokenizer([*contents, *schemas, *[FRAME] * len(contents), WORDS])
    files["smoke/tokenizer/tokenizer.json"] = made.to_str(pretty=True) + "\n"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    files["smoke/tokenizer/tokenizer_config.json"] = json.dumps(config, indent=2) + "\n"
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8"))
        print(f"{path}  {len(content.encode('utf-8')):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
