"""A terminal's screen, without its lower end: what a program's writes look like, line by line."""
import io
import re


class Screen(io.StringIO):
    """A text file that is a terminal of so many columns. seen: its lines after every write, wrapped ones joined."""
    encoding = 'utf-8'

    def __init__(self, columns=80):
        super().__init__()
        self.columns, self.rows, self.wrapped, self.y, self.x, self.seen = columns, [''], set(), 0, 0, []

    def isatty(self):
        return True

    def reconfigure(self, **how):
        pass

    def write(self, text):
        for piece in re.findall(r'\x1b\[\d*[A-Z]|.', text, re.DOTALL):
            self.put(piece)
        self.seen.append(self.lines())
        return len(text)

    def put(self, piece):
        if piece == '\r':
            self.x = 0
        elif piece == '\n':
            self.go(self.y + 1)
            self.x = 0                                  # as a terminal's driver makes \r\n of it
        elif piece == '\x1b[A':
            self.go(max(0, self.y - 1))
        elif piece == '\x1b[K':
            self.rows[self.y] = self.rows[self.y][:self.x]
        else:
            assert piece.isprintable(), f'{piece!r} is not known here'
            if self.x == self.columns:
                self.go(self.y + 1)
                self.wrapped.add(self.y)
                self.x = 0
            row = self.rows[self.y].ljust(self.x)
            self.rows[self.y] = row[:self.x] + piece + row[self.x + 1:]
            self.x += 1

    def go(self, y):
        self.y = y
        self.rows += [''] * (y + 1 - len(self.rows))

    def lines(self):
        """The lines that are not blank, those that were too long for a row in one piece."""
        found = []
        for number, row in enumerate(self.rows):
            if number in self.wrapped and found:
                found[-1] += row
            else:
                found.append(row)
        return [line.rstrip() for line in found if line.strip()]
