// Shows the items of a task, fifty at a time, with filters and a search. Every text is set as text, never as markup.
const data = JSON.parse(document.getElementById('items').textContent), PAGE = 50;
const get = name => document.getElementById(name), list = value => Array.isArray(value) ? value : value == null ? [] : [value];
const element = (tag, text = '', kind = '') => Object.assign(document.createElement(tag), {textContent: text, className: kind});
let task = data.tasks[0], matching = [], shown = 0;

const textOf = item => item.text ??= item.rows.map(r => r ? [r.prompt, JSON.stringify(r.target), ...list(r.replies).map(String), ...list(r.thought)].join('\n') : '').join('\n').toLowerCase();

function folded(title, text) {
  const box = element('details');
  box.append(element('summary', title), element('pre', text));
  return box;
}

function answer(row, name) {
  const side = element('div');
  if (name) side.append(element('h4', name));
  if (!row) { side.append(element('pre', 'not asked')); return side; }
  const scores = Object.entries(row.scores).filter(([, v]) => typeof v === 'number').map(([k, v]) => `${k} ${Number(v.toPrecision(4))}`).join(', ');
  if (scores) side.append(element('h4', scores));
  const ended = list(row.ended_by), tokens = list(row.tokens), repeats = list(row.repeats), thoughts = list(row.thought);
  if (!ended.length) { side.append(element('h4', 'likelihoods'), element('pre', row.replies.map(r => JSON.stringify(r)).join('\n'))); return side; }
  row.replies.forEach((text, i) => {
    side.append(element('h4', `${ended[i]}, ${tokens[i] ?? '?'} tokens${repeats[i] ? ', repeats itself' : ''}`));
    if (thoughts[i]) side.append(folded('thought', thoughts[i]));
    side.append(element('pre', String(text)));
  });
  return side;
}

function card(item) {
  const row = item.rows.find(Boolean), box = element('article', '', 'chat'), head = element('header', String(row.doc_id)), sides = element('div', '', 'sides');
  for (const [flag, kind] of [['wrong', 'bad'], ['cut', 'bad'], ['changed', '']]) if (item[flag]) head.append(' · ', element('b', flag, kind));
  item.rows.forEach((r, i) => sides.append(answer(r, data.columns.length > 1 ? data.columns[i] : '')));
  box.append(head, folded('prompt', row.prompt), sides, element('footer', 'target: ' + (typeof row.target === 'string' ? row.target : JSON.stringify(row.target))));
  return box;
}

function more() {
  get('cards').append(...matching.slice(shown, shown + PAGE).map(card));
  shown = Math.min(shown + PAGE, matching.length);
  get('count').textContent = `${matching.length} of ${task.items.length} items` + (task.left ? `; ${task.left} more are only in samples/${task.name}.jsonl` : '');
  get('more').hidden = shown >= matching.length;
}

function apply() {
  const words = get('text').value.toLowerCase(), flags = ['wrong', 'cut', 'changed'].filter(f => get(f)?.checked);
  matching = task.items.filter(item => flags.every(f => item[f]) && (!words || textOf(item).includes(words)));
  shown = 0;
  get('cards').replaceChildren();
  more();
}

let waiting;
for (const name of ['wrong', 'cut', 'changed']) get(name)?.addEventListener('change', apply);
get('text').addEventListener('input', () => { clearTimeout(waiting); waiting = setTimeout(apply, 120); });
get('task')?.addEventListener('change', e => { task = data.tasks[Number(e.target.value)]; apply(); });
get('more').addEventListener('click', more);
get('export').addEventListener('click', () => {
  const link = element('a');
  link.href = URL.createObjectURL(new Blob(matching.map(item => JSON.stringify(data.columns.length > 1 && data.both ? item.rows : item.rows[0]) + '\n'), {type: 'application/x-ndjson'}));
  link.download = task.name + '.jsonl';
  link.click();
  URL.revokeObjectURL(link.href);
});
apply();
