#!/usr/bin/env bash
# transformers 5.24.0, jinja2 3.1.6.
#
# Expected: apply_chat_template renders the chat's template over the messages it is given. An
# assistant's message that only calls a tool often has "content": None, and a template may ask
# "content is none".
#
# What happens: keys of a message whose value is None are removed first. The template sees a message
# without the key, where "is none" is false, because what is missing is undefined rather than None.
# None deeper inside, such as an argument of the call, stays. Nothing is said.
#
# Seen:
#     the template by jinja2: <user>Rain?<end><assistant>(no text){"at": "Oslo", "on": null}<end>
#     apply_chat_template:    <user>Rain?<end><assistant>{"at": "Oslo", "on": null}<end>
#     keys that it sees:      ['role', 'content'] ['role', 'tool_calls']
#
# Why it matters: a server that renders the same template by jinja2 itself shows the model another
# text than it was trained on. Pairs with tool calls are hit on the chosen and the rejected side in
# different measure, since only one of the two may have text.
#
# What to do: write templates that ask "if m.content" rather than "is none" or "is defined". Compare
# one rendered tool call with what the server sends.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 jinja2==3.1.6 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

template = """{% for m in messages %}<{{ m.role }}>\
{% if m.content is none %}(no text){% elif m.content is defined %}{{ m.content }}{% endif %}\
{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}<end>\
{% endfor %}"""
arguments = {"at": "Oslo", "on": None}
call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
chat = [{"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]}]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
direct = jinja2.Environment().from_string(template).render(messages=chat)
applied = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
print("the template by jinja2:", direct)
print("apply_chat_template:   ", applied)
keys = "{% for m in messages %}{{ m.keys() | list }} {% endfor %}"
print("keys that it sees:     ",
      tokenizer.apply_chat_template(chat, chat_template=keys, tokenize=False))
assert "(no text)" in direct and "(no text)" not in applied, "behaviour has changed"
assert '"on": null' in applied, "behaviour has changed: None inside a call goes, too"
PY
