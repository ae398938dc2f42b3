"""One calibration pass for all variants with the same text, cached in a file: yields what calibrate.passes yields."""
import hashlib
import json
import os
import sys
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from decomposition import calibrate
from decomposition.calibrate import Stats


def beginning(text, tokens):
    """The batches of the first so many tokens of [(x, y)], whole ones."""
    found = []
    for pair in text:
        if sum(x.numel() for x, _ in found) < tokens:
            found.append(pair)
    return found


def digest(state):
    """16 hexadecimal digits that change with names, shapes and sums."""
    parts = [f'{name} {tuple(t.shape)} {t.double().sum().item()!r}' for name, t in sorted(state.items())]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]


class Calibration:
    """The statistics of some sites of one dense model on one text.

    model: dense, in eval mode; text: [(x, y)]; folder: for the files; name: of the files; identity: whatever the statistics
    depend on, as JSON values: a file of another identity is replaced. A file has 8 in^2 bytes per distinct input and with
    gradients 8 out^2 per site, in safetensors; where it cannot be written, every call measures again. cpu_s: CPU seconds
    spent on the files so far. gradient_tokens: gradients are measured on the first so many tokens of the text, 0 = all;
    memory: bytes of sums at once.
    """

    def __init__(self, model, sites, text, folder, name, identity, gradient_tokens=0, memory=calibrate.MEMORY):
        self.model, self.sites, self.text, self.folder, self.name = model, list(sites), list(text), folder, name
        self.gains, self.cpu_s = {}, 0.0                # gains: of compression.sizes, which follow from these statistics
        self.short, self.memory = beginning(text, gradient_tokens) if gradient_tokens else None, memory
        self.identity = json.dumps([identity, self.sites, *[gradient_tokens] * bool(gradient_tokens)], sort_keys=True)

    def path(self, gradients):
        return os.path.join(self.folder, self.name + '_gradients' * gradients + '.safetensors')

    def passes(self, model, sites, batches, gradients=False):
        """Yield {site: Stats} site by site, as calibrate.passes does for this model and this text."""
        if batches is not self.text or set(sites) - set(self.sites):
            yield from calibrate.passes(model, sites, batches, gradients)
            return
        calibrate.check_enough(self.model, sites, batches)
        if not self.there(gradients) and not self.gather(gradients):
            yield from calibrate.passes(self.model, sites, self.text, gradients)
            return
        for site in sites:
            yield {site: self.read(site, gradients)}

    def there(self, gradients):
        """Whether the files are complete and of this identity."""
        return all(map(self.sound, [self.path(False), *[self.path(True)] * gradients]))

    def sound(self, path):
        """Whether a file is there and of this identity."""
        try:
            with safe_open(path, 'pt') as file:
                return (file.metadata() or {}).get('identity') == self.identity
        except (OSError, SafetensorError):
            return False

    def gather(self, gradients):
        """One pass over the text into the files; False where they cannot be written."""
        begin = time.process_time()
        try:
            os.makedirs(self.folder, exist_ok=True)
            if self.short is None or not gradients:
                self.measure(self.text, True, gradients)
            else:
                if not self.there(False):
                    self.measure(self.text, True, False)
                self.measure(self.short, False, True)
        except (OSError, SafetensorError) as error:
            print(f'the calibration is not cached: {error}', file=sys.stderr, flush=True)
            return False
        finally:
            self.cpu_s += time.process_time() - begin
        return True

    def measure(self, text, inputs, gradients):
        """Write the statistics of the inputs, those of the gradients, or both, on this text."""
        kinds, leader = {kind: {} for kind, wanted in ((False, inputs), (True, gradients)) if wanted}, {}
        for found in calibrate.passes(self.model, self.sites, text, gradients, self.memory):
            for site, stats in found.items():
                first = leader.setdefault(id(stats.covariance), (site, stats))[0]
                if inputs and first == site:
                    kinds[False] |= {f'{site}.mean': stats.mean, f'{site}.covariance': stats.covariance,
                                     f'{site}.count': torch.tensor(stats.count)}
                elif inputs:
                    kinds[False][f'{site}.as.{first}'] = torch.zeros(0)
                if gradients:
                    kinds[True][f'{site}.gradient'] = stats.gradient
        for kind, tensors in kinds.items():
            self.write(tensors, self.path(kind))

    def write(self, tensors, path, **more):
        save_file({name: t.contiguous() for name, t in tensors.items()}, path + '.tmp', {'identity': self.identity, **more})
        os.replace(path + '.tmp', path)

    def read(self, site, gradients):
        """The Stats of one site from the files."""
        device = str(calibrate.device_of(self.model))
        with safe_open(self.path(False), 'pt', device) as file:
            prefix = f'{site}.as.'
            first = next((name[len(prefix):] for name in file.keys() if name.startswith(prefix)), site)
            # clones, as safetensors maps the file, which another run may replace
            mean, covariance, count = (file.get_tensor(f'{first}.{part}').clone()
                                       for part in ('mean', 'covariance', 'count'))
        stats = Stats(int(count), mean, covariance)
        if gradients:
            with safe_open(self.path(True), 'pt', device) as file:
                stats.gradient = file.get_tensor(f'{site}.gradient').clone()
        return stats


class StreamedCalibration(Calibration):
    """A Calibration of a model whose statistics are larger than the memory: written pass by pass, read onto its device.

    A file per site and kind, in float32, half the size; an interrupted calibration goes on with the sites that it lacks.
    """

    def path(self, gradients, site=''):
        return os.path.join(self.folder, self.name, f'{site}{".gradient" * gradients}.safetensors')

    def lacking(self, gradients):
        """The sites without a file of that kind."""
        return [site for site in self.sites if not self.sound(self.path(gradients, site))]

    def there(self, gradients):
        return not self.lacking(False) and not (gradients and self.lacking(True))

    def measure(self, text, inputs, gradients):
        os.makedirs(os.path.dirname(self.path(False)), exist_ok=True)
        wanted = {site for kind, on in ((False, inputs), (True, gradients)) if on for site in self.lacking(kind)}
        for found in calibrate.passes(self.model, [s for s in self.sites if s in wanted], text, gradients, self.memory):
            leader = {}
            for site, stats in found.items():
                first = leader.setdefault(id(stats.covariance), site)
                own = {'mean': stats.mean, 'covariance': stats.covariance.float()} if first == site else {}
                if inputs:
                    self.write(own | {'count': torch.tensor(stats.count)}, self.path(False, site), like=first)
                if gradients:
                    self.write({'gradient': stats.gradient.float()}, self.path(True, site))

    def read(self, site, gradients):
        device = str(calibrate.device_of(self.model))
        with safe_open(self.path(False, site), 'pt') as file:
            first = file.metadata()['like']
        with safe_open(self.path(False, first), 'pt', device) as file:
            mean, covariance, count = (file.get_tensor(part) for part in ('mean', 'covariance', 'count'))
        stats = Stats(int(count), mean.clone(), covariance.double())
        if gradients:
            with safe_open(self.path(True, site), 'pt', device) as file:
                stats.gradient = file.get_tensor('gradient').double()
        return stats
