"""A page in headless Chromium: what a script finds there, and what the console said."""
import base64
import hashlib
import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on this machine')
RUNNER = '''
const errors = [];
addEventListener("error", event => errors.push(event.message));
const pause = ms => new Promise(done => setTimeout(done, ms));
addEventListener("load", async () => {
  await pause(300);
  let found = null;
  try { found = await (async () => { SCRIPT })(); } catch (error) { errors.push(String(error)); }
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify({ found, errors });
  document.body.append(place);
});
'''


def visit(page, script, width=1280, where=''):
    """What the body of an async function returns in the page; fails where a script or the console reports an error.

    where: the part of the address behind #. The page's policy gets the script's hash, so that it is as strict as before.
    """
    source = page.read_text(encoding='utf-8')
    code = RUNNER.replace('SCRIPT', script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    copy = page.with_name(f'{page.stem}_visited.html')
    copy.write_text(source.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
                    .replace('</body>', f'<script>{code}</script></body>'), encoding='utf-8')
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},900', '--dump-dom',
               f'--user-data-dir={page.parent / "profile"}', '--virtual-time-budget=8000', '--enable-logging=stderr',
               f'{copy.as_uri()}#{where}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
    place = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert place, done.stderr[-2000:]
    answer = json.loads(html.unescape(place[1]))
    assert not answer['errors'] and not said, (answer['errors'], said)
    return answer['found']
