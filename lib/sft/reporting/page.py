"""The frame of a page, its style and script. A page is one text that loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

TEXT = 1500
"""Characters shown of one text."""
STYLE = """
:root{--bg:#fbfbfa;--card:#fff;--ink:#1c1f24;--soft:#626a75;--line:#e3e5e8;--one:#2563c9;--two:#d0661a;--raw:#a9c2ea;
--mark:#fdf0c4;--special:#8a5bc7;--bad:#b3261e;--good:#1a7f37}
@media (prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1c1f25;--ink:#e6e8eb;--soft:#9aa3ae;--line:#2e333b;
--one:#6ea3ff;--two:#f0975a;--raw:#3b5480;--mark:#4a3f14;--special:#c4a1f5;--bad:#ff8a80;--good:#5fd07f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
body>header{position:sticky;top:0;z-index:2;background:var(--bg);border-bottom:1px solid var(--line);padding:12px 24px;
display:flex;gap:8px 28px;align-items:baseline;flex-wrap:wrap}
h1{font-size:19px;margin:0;overflow-wrap:anywhere}h2{font-size:17px;margin:0 0 14px}h3{font-size:14px;margin:26px 0 8px;color:var(--soft);font-weight:600}
nav{display:flex;gap:4px 16px;flex-wrap:wrap}nav a{color:var(--soft);text-decoration:none;font-size:14px}nav a:hover{color:var(--one)}
main{max-width:1128px;margin:0 auto;padding:8px 24px 60px}
section{margin:28px 0 40px;scroll-margin-top:64px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;display:flex;flex-direction:column}
.tile b{font-size:23px;font-weight:600;font-variant-numeric:tabular-nums}.tile i{font-style:normal;order:-1;color:var(--soft);font-size:13px}
.tile small{color:var(--soft);font-size:12.5px}
.chart{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 12px 8px;min-width:0}
.chart{overflow-x:auto}.chart svg{display:block;width:100%;height:auto}.chart+.scroll,.row+.scroll,.scroll+.scroll{margin-top:12px}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(280px,1fr));gap:12px;margin-top:12px}
figcaption,.legend{display:flex;gap:4px 18px;flex-wrap:wrap;font-size:13px;color:var(--soft);margin:0 0 6px 4px}
.key::before{content:"";display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:7px;vertical-align:middle;background:currentColor}
.key.one::before{color:var(--one)}.key.two::before{color:var(--two)}.key.raw::before{color:var(--raw)}
.legend{margin-top:8px}.legend .key::before{height:10px;width:10px}
.grid{stroke:var(--line);stroke-width:1}.tick,.axis,.value{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.raw{stroke:var(--raw);stroke-width:1}
.line.one{stroke:var(--one)}.line.two{stroke:var(--two)}.dot.one{fill:var(--one)}.dot.two{fill:var(--two)}.dot.raw{fill:var(--raw)}
.error{stroke-width:4;stroke-linecap:round;opacity:.25}.error.one{stroke:var(--one)}.error.two{stroke:var(--two)}
.c0{--k:#2563c9}.c1{--k:#d0661a}.c2{--k:#1a8f4d}.c3{--k:#a03bb8}.c4{--k:#c2293a}.c5{--k:#0e8a99}.c6{--k:#8a6d1b}.c7{--k:#6b7280}
@media (prefers-color-scheme:dark){.c0{--k:#6ea3ff}.c1{--k:#f0975a}.c2{--k:#5fd07f}.c3{--k:#d79bf0}.c4{--k:#ff8a80}.c5{--k:#5ecbd8}.c6{--k:#d8bc62}.c7{--k:#aab2bd}}
.line[class*=" c"]{stroke:var(--k)}.dot[class*=" c"]{fill:var(--k)}.key[class*=" c"]::before{color:var(--k)}
.narrow{display:none}
.bar{fill:var(--one);opacity:.85}.cursor{stroke:var(--soft);stroke-dasharray:3 3}
.share{display:flex;height:22px;border-radius:5px;overflow:hidden;border:1px solid var(--line)}
.share .one{background:var(--one)}.share .raw{background:var(--raw)}.share .two{background:var(--two)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{text-align:left;padding:8px 14px;border-top:1px solid var(--line);vertical-align:top}
thead th,tbody:first-child tr:first-child td{border-top:0}th{color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}
.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}td code{white-space:nowrap}
.score{width:200px;height:22px;display:block}.whisker{stroke:var(--one);stroke-width:5;stroke-linecap:round;opacity:.4}.point{fill:var(--one)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:12px}
.chat{background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0;margin-top:12px}.cards .chat{margin:0}
.chat header,.chat footer{padding:7px 14px;color:var(--soft);font-size:13px;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
.chat footer{border:0;border-top:1px solid var(--line)}
pre{margin:0;padding:12px 14px;font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
max-height:420px;overflow-y:auto}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:1px 0}.special{color:var(--special)}.end{color:var(--soft);user-select:none}
b.good{color:var(--good)}.whisker.good{stroke:var(--good)}.point.good{fill:var(--good)}
.whisker.bad{stroke:var(--bad)}.point.bad{fill:var(--bad)}.zero{stroke:var(--soft);stroke-width:1}.name{fill:var(--ink);font-size:13px}
.note{color:var(--soft);font-size:13.5px;margin:10px 0}.none{color:var(--soft)}.bad{color:var(--bad)}
details{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:8px 0}summary{padding:8px 14px;cursor:pointer}
#tip{position:fixed;z-index:3;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:6px 10px;
font-size:13px;box-shadow:0 4px 14px rgb(0 0 0/.14);font-variant-numeric:tabular-nums;white-space:pre}
@media (max-width:640px){main{padding:8px 12px 40px}body>header{position:static;padding:10px 12px}.wide{display:none}.narrow{display:block}
th,td{padding:6px 8px}table{font-size:13px}.tiles{grid-template-columns:repeat(auto-fill,minmax(140px,1fr))}}
@media print{body>header{position:static}pre{max-height:none}}
"""

SCRIPT = """
const tip=document.getElementById('tip');
for(const svg of document.querySelectorAll('svg[data-points]')){
 const d=JSON.parse(svg.dataset.points),cursor=svg.querySelector('.cursor');
 const nearest=(p,x)=>p.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a);
 svg.style.touchAction='pan-y';
 for(const kind of ['pointermove','pointerdown'])svg.addEventListener(kind,e=>{
  const box=svg.getBoundingClientRect(),at=(e.clientX-box.left)*svg.viewBox.baseVal.width/box.width;
  const x=d.x0+(at-d.left)/(d.right-d.left)*(d.x1-d.x0);
  if(x<d.x0||x>d.x1){leave();return}
  const main=nearest(d.series[0].points,x)[0];
  const px=d.left+(main-d.x0)/(d.x1-d.x0)*(d.right-d.left);
  cursor.setAttribute('x1',px);cursor.setAttribute('x2',px);cursor.setAttribute('visibility','visible');
  tip.textContent=d.x+' '+main+d.series.map(s=>{const p=nearest(s.points,main);
   return '\\n'+s.name+' '+Number(p[1].toPrecision(d.digits+1))+(p[0]===main?'':' ('+d.x+' '+p[0]+')')}).join('');
  tip.hidden=false;
  tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+'px';tip.style.top=(e.clientY+14)+'px';
 });
 const leave=()=>{tip.hidden=true;cursor.setAttribute('visibility','hidden')};
 svg.addEventListener('pointerleave',leave);svg.addEventListener('pointercancel',leave);
}
"""


def document(title: str, sections: Sequence[tuple[str, str]], note: str = "") -> str:
    """A complete page of (heading, HTML) sections. Its content security policy forbids every request."""
    links = "".join(f'<a href="#{anchor(t)}">{t}</a>' for t, _ in sections)
    body = "".join(f'<section id="{anchor(t)}"><h2>{t}</h2>{b}</section>' for t, b in sections)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><header><h1>{escape(title)}</h1><nav>{links}</nav></header>"
        f'<main>{note}{body}</main><div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def anchor(title: str) -> str:
    """The id of a section."""
    return title.lower().replace(" ", "-")


def table(
    head_row: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] | range = (), head: bool = True
) -> str:
    """Rows of HTML cells. The columns in `numbers` are aligned to the right; without `head` there is no heading row."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=num' if i in numbers else ''}>{c}</{tag}>" for i, c in enumerate(row))

    top = f"<thead><tr>{cells([escape(h) for h in head_row], 'th')}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def clip(text: str) -> str:
    """Escaped text; a long one is cut in the middle."""
    if len(text) > TEXT:
        text = text[: TEXT // 2] + " … " + text[-TEXT // 2 :]
    return escape(text)
