"""One calibration pass for all variants with the same text, cached in a file: yields what calibrate.passes yields."""
import json
import os
import sys
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from decomposition import calibrate
from decomposition.calibrate import Stats


class Watched(list):
    """Batches that show a progress bar during a loop."""

    def __iter__(self):
        return iter(tqdm(list(super().__iter__()), unit='batch', leave=False, desc='calibration',
                         disable=not sys.stderr.isatty()))


class Calibration:
    """The statistics of some sites of one dense model on one text.

    model: dense, in eval mode; text: [(x, y)]; folder: for the files; name: of the files; identity: whatever the statistics
    depend on, as JSON values: a file of another identity is replaced. A file has 8 in^2 bytes per distinct input and with
    gradients 8 out^2 per site, in safetensors; where it cannot be written, every call measures again. cpu_s: CPU seconds
    spent on the files so far.
    """

    def __init__(self, model, sites, text, folder, name, identity):
        self.model, self.sites, self.text, self.folder, self.name = model, list(sites), Watched(text), folder, name
        self.gains, self.cpu_s = {}, 0.0                # gains: of compression.sizes, which follow from these statistics
        self.identity = json.dumps([identity, self.sites], sort_keys=True)

    def path(self, gradients):
        return os.path.join(self.folder, self.name + '_gradients' * gradients + '.safetensors')

    def passes(self, model, sites, batches, gradients=False):
        """Yield {site: Stats} site by site, as calibrate.passes does for this model and this text."""
        if batches is not self.text or set(sites) - set(self.sites):
            yield from calibrate.passes(model, sites, batches, gradients)
            return
        calibrate.check_enough(self.model, sites, list(batches))
        if not self.there(gradients) and not self.gather(gradients):
            yield from calibrate.passes(self.model, sites, self.text, gradients)
            return
        for site in sites:
            yield {site: self.read(site, gradients)}

    def there(self, gradients):
        """Whether the files are complete and of this identity."""
        for path in [self.path(False), *[self.path(True)] * gradients]:
            try:
                with safe_open(path, 'pt') as file:
                    if (file.metadata() or {}).get('identity') != self.identity:
                        return False
            except (OSError, SafetensorError):
                return False
        return True

    def gather(self, gradients):
        """One pass over the text into the files; False where they cannot be written."""
        inputs, outputs, leader, begin = {}, {}, {}, time.process_time()
        for found in calibrate.passes(self.model, self.sites, self.text, gradients):
            for site, stats in found.items():
                first = leader.setdefault(id(stats.covariance), (site, stats))[0]
                if first == site:
                    inputs |= {f'{site}.mean': stats.mean, f'{site}.covariance': stats.covariance,
                               f'{site}.count': torch.tensor(stats.count)}
                else:
                    inputs[f'{site}.as.{first}'] = torch.zeros(0)
                if gradients:
                    outputs[f'{site}.gradient'] = stats.gradient
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.write(inputs, False)
            if gradients:
                self.write(outputs, True)
        except (OSError, SafetensorError) as error:
            print(f'the calibration is not cached: {error}', file=sys.stderr, flush=True)
            return False
        finally:
            self.cpu_s += time.process_time() - begin
        return True

    def write(self, tensors, gradients):
        aside = self.path(gradients) + '.tmp'
        save_file({name: t.contiguous() for name, t in tensors.items()}, aside, {'identity': self.identity})
        os.replace(aside, self.path(gradients))

    def read(self, site, gradients):
        """The Stats of one site from the files."""
        with safe_open(self.path(False), 'pt') as file:
            prefix = f'{site}.as.'
            first = next((name[len(prefix):] for name in file.keys() if name.startswith(prefix)), site)
            # clones, as safetensors maps the file, which another run may replace
            mean, covariance, count = (file.get_tensor(f'{first}.{part}').clone()
                                       for part in ('mean', 'covariance', 'count'))
        stats = Stats(int(count), mean, covariance)
        if gradients:
            with safe_open(self.path(True), 'pt') as file:
                stats.gradient = file.get_tensor(f'{site}.gradient').clone()
        return stats
