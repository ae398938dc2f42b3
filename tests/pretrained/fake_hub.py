"""A hub for tests, as a program: python fake_hub.py FOLDER serves FOLDER/OWNER/NAME as models, and prints its port.

Names: `gated` anywhere in a name refuses its files, `missing` has none. What is asked is printed, a line for each request.
"""
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(sys.argv[1])
COMMIT = 'c' * 40


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks: the list of files with sizes, and the files."""

    def answer(self, code, body=b'', **headers):
        self.send_response(code)
        for name, value in {'Content-Length': len(body), 'X-Repo-Commit': COMMIT, **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def refuse(self, code, kind):
        self.answer(code, json.dumps({'error': kind}).encode(), X_Error_Code=kind, X_Error_Message=kind)

    def do_GET(self):
        path = self.path.split('?')[0].strip('/')
        print(self.command, path, flush=True)
        if path.startswith('api/models/'):
            name = '/'.join(path.split('/')[2:4])
            folder = ROOT / name
            if not folder.is_dir():
                return self.refuse(401, 'RepoNotFound')
            files = [{'rfilename': file.name, 'size': file.stat().st_size} for file in sorted(folder.iterdir())]
            return self.answer(200, json.dumps({'id': name, 'modelId': name, 'sha': COMMIT, 'siblings': files}).encode(),
                               Content_Type='application/json')
        owner, name, _, _, file = path.split('/', 4)
        if 'gated' in name:
            return self.refuse(403, 'GatedRepo')
        place = ROOT / owner / name / file
        if not place.is_file():
            return self.refuse(404, 'EntryNotFound')
        body = place.read_bytes()
        return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
