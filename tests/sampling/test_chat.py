"""Chat templates against transformers' rendering, in a sandbox; conversations within the context; the loop on a terminal."""
import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

import configurator
from checkpoints import checkpoint
from data import hub_tokenizer, tokenizer_json
from sampling import chat
from tests.test_sample import META, ROOT, run, save  # noqa: F401
from variants import UserError

CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind"
          "<|im_end|>\n{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA = ("{{ bos_token }}\n{%- for message in messages %}\n    {%- if message.role == 'user' %}\n[INST] {{ message.content |"
         " trim }} [/INST]\n    {%- elif message.role == 'assistant' %}\n {{ message.content }}{{ eos_token }}\n"
         "    {%- else %}\n        {{- raise_exception('no role ' ~ message.role) }}\n    {%- endif %}\n"
         "    {%- if loop.index > 50 %}{%- break %}{%- endif %}\n{%- endfor %}")
JSON = '{% for m in messages %}{{ m | tojson }}{% endfor %}{% set ns = namespace(n=0) %}{{ ns.n }}'
TALK = [{'role': 'user', 'content': ' Héllo <b>"you"</b> '}, {'role': 'assistant', 'content': 'Hi.'},
        {'role': 'user', 'content': 'Why?'}]


@pytest.mark.parametrize('template', [CHATML, LLAMA, JSON])
def test_templates_render_as_transformers_does(template):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json.text_of({'tokenizer': 'gpt2', 'vocab_size': 300})),
        bos_token='<s>', eos_token='</s>', chat_template=template)
    expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert chat.render(template, TALK, bos_token='<s>', eos_token='</s>') == expected and 'Why?' in expected


@pytest.mark.parametrize('template, words', [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'SecurityError'),
    ("{{ messages.append(1) }}", 'SecurityError'), ("{{ messages[0].update({'role': 'x'}) }}", 'SecurityError'),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", 'SecurityError'),
    ("{% include '/etc/passwd' %}", 'TypeError'), ("{{ raise_exception('only users') }}", 'only users'),
    ("{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
     'more than 1,048,576 characters'), ('{% if %}', 'TemplateSyntaxError'), ('{{ 1 / 0 }}', 'ZeroDivisionError'),
    ("{{ range(10000000) | list }}", 'OverflowError')])
def test_a_template_of_a_stranger_can_do_nothing_else(template, words):
    messages = [dict(message) for message in TALK]
    with pytest.raises(UserError) as caught:
        chat.render(template, messages)
    assert words in str(caught.value) and 'chat template' in str(caught.value) and messages == TALK


def test_where_the_template_comes_from():
    settings = {'chat_template': 'A', 'bos_token': {'content': '<s>'}, 'eos_token': '</s>'}
    source = {'files': {'tokenizer_config.json': json.dumps(settings)}, 'tokens': {'eos_token_id': 2}}
    assert chat.template_of(source) == ('A', {'bos_token': '<s>', 'eos_token': '</s>'}) and chat.ends_of(source) == [2]
    source['files']['chat_template.jinja'] = 'B'
    source['files']['generation_config.json'] = '{"eos_token_id": [5, 6]}'
    assert chat.template_of(source)[0] == 'B' and chat.ends_of(source) == [5, 6]
    several = json.dumps({'chat_template': [{'name': 'tool', 'template': 'T'}, {'name': 'default', 'template': 'D'}]})
    assert chat.template_of({'files': {'tokenizer_config.json': several}})[0] == 'D'
    for odd in ({}, None, {'files': {'tokenizer_config.json': '{"chat_template": 3}'}}):
        with pytest.raises(UserError, match='no chat template'):
            chat.template_of(odd)


def test_a_conversation_that_is_too_long_forgets_its_beginning():
    from data import tokenizer
    said = []
    template, letters = '{% for m in messages %}{{ m.content }}.{% endfor %}', tokenizer.load({'tokenizer': 'bytes'})
    spoken = chat.Conversation(template, {}, letters, 30, 10, said.append, system='sys')
    for k in range(4):
        spoken.say('user', f'ask{k}')
        tokens = bytes(spoken.tokens()).decode()
        assert tokens.startswith('sys.') and tokens.endswith(f'ask{k}.') and len(tokens) <= 20
        spoken.say('assistant', f'say{k}')
    assert tokens == 'sys.ask2.say2.ask3.'[:4] + tokens[4:] and said and len(set(said)) == 1


def test_questions_end_with_the_input():
    shown = io.StringIO()
    assert list(chat.questions(io.StringIO('a\n\n  b c \n'), shown)) == ['a', 'b c'] and shown.getvalue() == ''


@pytest.fixture
def talker(tmp_path):
    """A folder of random weights over 300 byte pairs with a template, as a run that began from a chat model keeps it."""
    text = json.loads(tokenizer_json.text_of({'tokenizer': 'gpt2', 'vocab_size': 300}))
    meta = hub_tokenizer.describe(json.dumps(text), 'a test')
    model = save(tmp_path, meta=meta, vocab_size=300, block_size=512)
    files = {'tokenizer_config.json': json.dumps({'chat_template': CHATML})}
    checkpoint.save(tmp_path, {'step': 2, 'config': configurator.as_dict(model.config), 'model': model.state_dict(),
                               'data': meta, 'source': {'files': files, 'tokens': {'eos_token_id': 299}}})
    return tmp_path


def test_a_pipe_is_answered_line_by_line(talker):
    words = f'--out_dir={talker}', '--chat=True', '--max_new_tokens=5', '--temperature=0', '--device=cpu'
    done = subprocess.run([sys.executable, 'sample.py', *words], cwd=ROOT, input='Hello\nAgain\n', capture_output=True,
                          text=True, errors='replace')
    assert (done.returncode, done.stderr) == (0, '') and done.stdout[:2] != '> ' and done.stdout.count('\n') >= 2


def read_until(fd, words, seconds=100):
    shown, end = '', time.monotonic() + seconds
    while words not in shown and time.monotonic() < end:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                shown += os.read(fd, 4096).decode(errors='replace')
            except OSError:                             # the program has ended
                break
    return shown


def test_the_loop_on_a_terminal(talker):
    keyboard, screen = pty.openpty()
    process = subprocess.Popen([sys.executable, 'sample.py', f'--out_dir={talker}', '--chat=True', '--max_new_tokens=5',
                                '--device=cpu'], cwd=ROOT, stdin=screen, stdout=screen, stderr=screen)
    os.close(screen)
    assert read_until(keyboard, '> ').endswith('> ')
    os.write(keyboard, b'Hello there\n')
    shown = read_until(keyboard, '\n> ')
    assert shown.startswith('Hello there') and shown.endswith('> ')
    os.write(keyboard, b'\x04')                         # Ctrl-D
    rest = read_until(keyboard, 'per second')
    assert 'sample.py: ' in rest and 'per second' in rest
    assert process.wait(60) == 0                        # its last words may still come: the terminal stays open
    os.close(keyboard)
