import base64
import html.parser

from helios_jax.ablate import page

EVIL = '<script>alert("&")</script> a|b'
PNG = b'\x89PNG\x00\xff'
SECTIONS = [
    page.Section(EVIL, [EVIL, page.Grid(['name', EVIL], [['one', EVIL], ['two', '2']])]),
    page.Section('Seen', [page.Picture('seen.png', PNG, EVIL), page.Verbatim(f'{EVIL}\n```\nx')]),
]


class Parsed(html.parser.HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_one_file_without_scripts_and_with_escaped_text():
    found = Parsed(page.to_html(EVIL, SECTIONS))
    assert found.open == []  # every element is closed
    names = [tag for tag, _ in found.tags]
    assert 'script' not in names and 'link' not in names and names.count('table') == 1
    assert found.text.count(EVIL) == 8  # title twice, heading, paragraph, two cells, caption, text
    (image,) = (attrs for tag, attrs in found.tags if tag == 'img')
    kind, content = image['src'].split(',')
    assert kind == 'data:image/png;base64' and base64.b64decode(content) == PNG
    assert not [attrs for tag, attrs in found.tags if tag != 'img' and {'src', 'href'} & {*attrs}]


def test_markdown_escapes_tags_and_the_bars_of_tables(tmp_path):
    path = page.write(tmp_path, 'Made up', SECTIONS)
    text = path.read_text()
    escaped = '&lt;script&gt;alert("&amp;")&lt;/script&gt; a'
    outside, code = text.split('````text\n')
    assert '<script>' not in outside and EVIL in code
    assert text.startswith('# Made up\n\n## ' + escaped)
    assert f'| name | {escaped}\\|b |\n| --- | --- |\n| one | {escaped}\\|b |\n' in text
    assert f'![Seen](seen.png)\n\n{escaped}|b\n' in text
    assert (tmp_path / 'seen.png').read_bytes() == PNG
    assert {p.name for p in tmp_path.iterdir()} == {'report.md', 'report.html', 'seen.png'}
