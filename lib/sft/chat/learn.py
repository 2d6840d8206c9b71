"""Learns from small made-up conversations how a Jinja template writes an assistant's turn.

In: `TemplateProbe`, which renders them. Out: `TurnRules`: the header of a turn, what the generation prompt adds, and the special tokens
that end a turn. Raises SftError for a template from which no correct loss mask can be derived.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from sft.chat.probe import THOUGHT, TemplateProbe, TwoTurns
from sft.chat.rows import BadRow
from sft.chat.spans import TurnRules, common_prefix
from sft.chat.special_tokens import SpecialTokens
from sft.chat.trace import Trace
from sft.common.errors import SftError
from sft.recipe.chat_templates import TEMPLATES

THINK = "<think>"


class Endings(NamedTuple):
    """The special tokens that end an answer; see `TurnRules`."""

    terminator: str | None
    last_terminator: str
    from_next: bool = False
    appended: str = ""


def known_templates() -> list[str]:
    return sorted(TEMPLATES)


def refuse(probe: TemplateProbe, fault: str, advice: str) -> NoReturn:
    """Raises SftError: the template cannot be used."""
    raise SftError(f"prepare.template: {probe.name}{fault}; next: {advice}")


def observe(probe: TemplateProbe) -> TwoTurns:
    """What the template makes of a plain conversation. Raises SftError when it cannot be masked."""
    try:
        turns = probe.two_turns()
    except BadRow as error:
        refuse(
            probe,
            f" cannot render a plain two-turn conversation: {error.detail}",
            f"use a template that can, or choose one of {', '.join(known_templates())}",
        )
    if turns.fault:
        refuse(
            probe,
            f" does not write assistant message {turns.fault} once, so no mask can be derived from it",
            f"write the messages in a loop, or choose one of {', '.join(known_templates())}",
        )
    if foreign := probe.foreign_text(turns):
        role, answer = foreign
        refuse(
            probe,
            f" writes the text of a {role} message inside of assistant message {answer}, where it would be trained",
            f"let an answer's turn write the answer alone, or choose one of {', '.join(known_templates())}",
        )
    return turns


def learn_rules(
    probe: TemplateProbe, turns: TwoTurns, specials: SpecialTokens, tokens: SpecialTokens, eos: str
) -> TurnRules:
    """`tokens`: all texts that are one token wherever they stand, special or not."""
    trace = turns.trace
    (before, after), (last_before, _) = (trace.region_text(index).split(turns.contents[index], 1) for index in (1, 3))
    prompt = _prompt(turns, before, tokens)
    # Scaffold is what the generation prompt gives, but only as far as the turns really begin with it: a thinking prompt may
    # go on with <think>, which the data spells out. Without a prompt nothing is scaffold.
    shared = common_prefix([prompt, before, last_before]) if prompt else ""
    header = shared[: min(tokens.edge(text, len(shared)) for text in (prompt, before))]
    if prompt != before and before.strip() and prompt.endswith(before):
        header = prompt = before  # the prompt says more before the header
    if prompt and not header:
        refuse(
            probe,
            f" opens an answer with {prompt!r} when prompted, but writes {before!r} before an answer in the history, so the trained"
            " text would not be what the model is asked for",
            "make the two equal",
        )
    start = trace.regions[1][0][0]
    opening = trace.text[:start] + header
    endings = _endings(probe, turns, after, specials)
    inside = trace.region_text(1)[: len(before) + 1]
    of_calls = _terminator_of_calls(probe, specials, endings.from_next)
    found = {
        endings.terminator,
        endings.last_terminator,
        None if of_calls in specials.pattern.findall(inside) else of_calls,
    }
    return TurnRules(
        header=header,
        generation_prefix=prompt[len(header) :],
        closing=_closing(probe, header, prompt[len(header) :]),
        terminator=endings.terminator,
        last_terminator=endings.last_terminator,
        terminators=tuple(sorted(token for token in found if token)),
        from_next=endings.from_next,
        appended=endings.appended,
        appended_to_calls=(of_calls or endings.appended)
        if endings.from_next and endings.appended
        else endings.appended,
        gap=after if endings.terminator is None else "",
        last_gap=trace.text.split(turns.contents[3], 1)[1] if endings.appended else "",
        eos=eos,
        prompt_differs=not turns.asked[1].startswith(opening)
        if prompt
        else turns.asked[1] != opening and turns.asked[1].rstrip() == opening.rstrip(),
    )


def _prompt(turns: TwoTurns, before: str, tokens: SpecialTokens) -> str:
    """What the generation prompt adds to a question, from where the answer's turn begins."""
    without, asked = turns.asked
    text, question = turns.trace.text, turns.contents[0]
    start = turns.trace.regions[1][0][0]
    between = text[text.index(question) + 1 : start] if question in text[:start] else text[:start]
    after_question = asked.rpartition(question)[2]
    if after_question.startswith(between):
        prompt = after_question[len(between) :]
        if without != asked or before.startswith(prompt) or tokens.pattern.search(common_prefix([prompt, before])):
            return prompt
    if without == asked:
        return ""
    return asked[tokens.edge(asked, len(common_prefix([without, asked]))) :]


def _endings(probe: TemplateProbe, turns: TwoTurns, after: str, specials: SpecialTokens) -> Endings:
    """The tokens that end an answer in the history and at the end."""
    trace = turns.trace
    after_last = trace.text.split(turns.contents[3], 1)[1]
    terminator = specials.ending(after, turns.eos)
    if terminator is not None:
        if terminator in specials.pattern.findall(after_last):
            return Endings(terminator, terminator)
        last = specials.ending(after_last, turns.eos)
        # A template may write the last answer without its end, so that it can be continued.
        return Endings(terminator, last) if last else Endings(terminator, terminator, appended=terminator)
    following = specials.pattern.match(trace.text, trace.regions[1][0][1])
    next_token = following.group() if following and not after.strip() else None
    last = specials.ending(after_last, turns.eos)
    if last is not None:
        if next_token is not None and specials.pattern.match(after_last) and after_last.startswith(next_token):
            return Endings(last, last, from_next=True)
        return Endings(None, last)
    if next_token is None:
        refuse(
            probe,
            " writes no special token after the last answer, so the model would never learn to stop",
            "end assistant turns with {{ eos_token }} or the tokenizer's end-of-turn token",
        )
    return Endings(next_token, next_token, from_next=True, appended=next_token)


def _terminator_of_calls(probe: TemplateProbe, specials: SpecialTokens, from_next: bool) -> str | None:
    """The token that ends a turn of tool calls, which may be another than the one that ends an answer."""
    written, following = probe.turn_of_calls()
    if from_next:
        found = specials.pattern.match(following)
        return found.group() if found and written else None
    for text in (probe.last_turn_of_calls().rstrip(), written.rstrip()):
        tokens = specials.pattern.findall(text)
        if tokens and text.endswith(tokens[-1]):
            return str(tokens[-1])
    return None


def _closing(probe: TemplateProbe, header: str, prefix: str) -> str:
    """What an answer writes between its thinking and its content, if the generation prefix opens thinking; "" if it does not."""
    if not prefix.strip():
        return ""
    written = probe.turn_of_thinking()
    opening, found, rest = written.partition(THOUGHT)
    if found and opening.removeprefix(header).strip() == prefix.strip():
        closing, found, _ = rest.partition(probe.answer)
        return closing if found else ""
    if found or prefix.strip() != THINK:
        return ""
    return (
        "\n</think>\n\n" if prefix.endswith("\n") else "</think>"
    )  # as DeepSeek-R1, whose template writes no thinking


def scaffold_tokens(probe: TemplateProbe, rules: TurnRules, added: SpecialTokens) -> list[str]:
    """The added tokens that the template writes as scaffold: in headers, around questions and results. Some tokenizers do not declare
    them special, but a message's text must not become such a token. What an answer writes is no scaffold: <think>, <tool_call>."""
    scaffold = [rules.header, *rules.terminators]
    said: list[str] = [rules.generation_prefix]
    for messages, trace in probe.conversations():
        position = 0
        for index, message in enumerate(messages):
            for start, end in trace.regions.get(index, ()):
                scaffold.append(trace.text[position:start])
                (said if message["role"] == "assistant" else scaffold).append(
                    trace.text[start:end].removeprefix(rules.header)
                )
                position = end
        scaffold.append(trace.text[position:])
    found = set(added.pattern.findall("\n".join(scaffold))) - set(added.pattern.findall("\n".join(said)))
    in_header = set(added.pattern.findall(rules.header))
    # Gemma has tokens for several line breaks: white space of a message is no control token.
    return sorted(token for token in found | in_header if token.strip() and "think" not in token.lower())


def check_generation_blocks(probe: TemplateProbe, rules: TurnRules, trace: Trace) -> None:
    """Refuses {% generation %} blocks that miss an answer or its terminator."""
    for index, terminator in ((1, rules.terminator), (3, rules.last_terminator)):
        blocks = trace.blocks.get(index, [])
        if not blocks:
            refuse(probe, f": no {{% generation %}} block in assistant message {index}", "add it")
        written = trace.text[slice(*blocks[-1])]
        if terminator is not None and not rules.from_next and not rules.appended and terminator not in written:
            refuse(
                probe,
                f": the {{% generation %}} block ends before the terminator {terminator!r}, so the model would never learn to stop",
                "move {% endgeneration %} behind it",
            )
