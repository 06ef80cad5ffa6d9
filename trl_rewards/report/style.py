"""How the page looks."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f4f5f7; --text: #24292f; --soft: #5d6672; --line: #dfe3e8;
  --accent: #2468b2; --bad: #b42318; --bad-paper: #fdecea; --good: #1a7f5a; }
@media (prefers-color-scheme: dark) { :root { --paper: #171a1f; --page: #0e1013; --text: #d5d9e0; --soft: #98a1ad;
  --line: #2c323a; --accent: #6cb0f5; --bad: #ff9389; --bad-paper: #35191a; --good: #5fcf9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 10px; }
h3 { font-size: 15px; margin: 0 0 8px; }
.kind { margin: 0 0 4px; color: var(--accent); font-weight: 600; font-size: 13px; }
.signature, pre, .completion, .prompt { font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.signature { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 16px; }
.tile, figure, article, pre, .scroll { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; display: flex; flex-direction: column; }
.tile span { color: var(--soft); font-size: 13px; }
.tile strong { font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.note, .caption, figcaption { color: var(--soft); font-size: 13px; margin: 6px 0; }
.alarm, .calm { margin: 8px 0; padding: 8px 14px; border-radius: 8px; }
.alarm { background: var(--bad-paper); color: var(--bad); }
.calm { padding-left: 0; color: var(--good); }
.evidence { list-style: none; margin: 0; padding: 0; }
.evidence li { background: var(--paper); border: 1px solid var(--line); border-left: 4px solid var(--accent);
  border-radius: 8px; padding: 9px 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
.evidence .harm { border-left-color: var(--bad); background: var(--bad-paper); }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; align-items: stretch;
  grid-auto-flow: dense; }
figure { margin: 0; padding: 14px 16px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin: 8px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 6px 14px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--soft); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
article { padding: 14px 16px; margin: 0 0 14px; }
.prompt, .completion { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; }
.prompt { max-height: 180px; border-left: 3px solid var(--accent); padding: 2px 0 2px 12px; margin-bottom: 12px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.pair > * { min-width: 0; }
.card { display: flex; flex-direction: column; height: 100%; }
.when { margin: 0 0 6px; color: var(--soft); font-size: 13px; font-weight: 600; }
.completion { background: var(--page); border-radius: 8px; padding: 10px 12px; max-height: 320px; flex: 1;
  margin-bottom: 8px; }
.card table { font-size: 13px; }
.card th, .card td { padding: 3px 4px; }
.total { font-weight: 700; }
.total th { font-weight: 700; }
.none { color: var(--soft); font-style: italic; }
.hole { color: var(--bad); font-weight: 600; }
pre { padding: 14px 16px; overflow-x: auto; margin: 0; }
details pre { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; margin: 6px 0; }
footer { margin-top: 44px; color: var(--soft); font-size: 13px; }
@media (max-width: 760px) { .figures, .pair { grid-template-columns: 1fr; } h1 { font-size: 24px; } }
@media print { body { background: none; } figure, article { break-inside: avoid; } }
"""
