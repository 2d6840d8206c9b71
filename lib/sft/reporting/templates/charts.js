// Draws every figure from the data in it with Vega-Lite: charts.py says what the fields are. Drawn again when the theme or the width changes.
const colour = name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim();
const short = v => v == null ? '–' : Number.isInteger(v) ? v.toLocaleString('en') : String(Number(v.toPrecision(5)));
const make = (tag, text = '', kind = '') => Object.assign(document.createElement(tag), {textContent: text, className: kind});

function lines(chart, state, width) {
  const name = chart.axes[state.view], keys = chart.lines.map((_, i) => i), shown = keys.filter(k => !state.hidden.has(k)), of = kind => shown.filter(k => chart.lines[k].kind === kind);
  const rows = shown.flatMap(k => chart.lines[k].points.map(p => ({k, x: p[state.view], v: p.at(-1)})));
  const tip = (value, safe) => {
    const x = Number(value.x), found = shown.map(k => [chart.lines[k].name, chart.lines[k].points.findLast(p => p[state.view] <= x)]);
    return `<table><tr><td>${safe(name)}</td><td>${short(x)}</td></tr>` + found.map(([line, p]) =>
      `<tr><td class="key">${safe(line)}</td><td>${short(p?.at(-1))}${p && p[state.view] < x ? ` at ${short(p[state.view])}` : ''}</td></tr>`).join('') + '</table>';
  };
  const x = {field: 'x', type: 'quantitative', title: name, scale: chart.log_x ? {type: 'log', nice: false} : {zero: false, nice: false}, axis: {grid: false, ...chart.log_x && {format: '~e'}, tickCount: width > 500 ? 8 : 4, labelOverlap: true}};
  const y = {field: 'v', type: 'quantitative', title: null, scale: state.log ? {type: 'log', nice: false} : {zero: false}};
  const paint = {field: 'k', type: 'nominal', legend: null, scale: {domain: keys, range: chart.lines.map(l => colour('c' + l.colour))}};
  const layer = (names, mark) => names.length ? [{transform: [{filter: {field: 'k', oneOf: names}}, ...state.log ? [{filter: 'datum.v > 0'}] : []], mark: {clip: true, ...mark}, encoding: {x, y, color: paint}}] : [];
  const curves = [...layer(of('thin'), {type: 'line', strokeWidth: 1, opacity: .4}), ...layer(of('line'), {type: 'line', strokeWidth: 2}),
    ...layer(of('dots'), {type: 'line', strokeWidth: 1.5, point: {size: 34}})];
  const bars = shown.flatMap(k => chart.lines[k].spread.map(([x, v, high]) => ({k, x, v, high})));
  const spread = bars.length ? [{data: {values: bars}, mark: {type: 'rule', strokeWidth: 4, opacity: .3}, encoding: {x, y, y2: {field: 'high'}, color: paint}}] : [];
  const tooltip = [{field: 'x', type: 'quantitative', format: '.12~g', title: 'x'}];
  const near = {params: [{name: 'near', select: {type: 'point', fields: ['x'], nearest: true, on: 'pointerover', clear: 'pointerout'}}],
    mark: {type: 'rule', color: colour('soft')}, encoding: {x, opacity: {condition: {param: 'near', empty: false, value: .6}, value: 0}, tooltip}};
  const inner = width - 56, axis = {minExtent: 44, maxExtent: 44};
  const main = {width: inner, height: chart.zoom ? 300 : 170, layer: [...curves, ...spread, near], transform: chart.zoom ? [{filter: {param: 'brush'}}] : []};
  const data = {values: rows}, config = {axisY: axis};
  if (!chart.zoom) return {spec: {data, config, ...main}, tip};
  const strip = {width: inner, height: 40, params: [{name: 'brush', select: {type: 'interval', encodings: ['x'], mark: {fill: colour('c0'), fillOpacity: .18}}}],
    transform: curves[0]?.transform ?? [], mark: {type: 'line', strokeWidth: 1}, encoding: {x: {...x, title: 'drag here to zoom, tap to reset', axis: {...x.axis, labels: false, ticks: false}}, y: {...y, axis: null}, color: paint}};
  return {spec: {data, config, vconcat: [main, strip], spacing: 8}, tip};
}

function bars(chart, state, width) {
  return {spec: {data: {values: chart.bars}, width: Math.min(width - 56, 80 * chart.bars.length), height: 170, config: {axisY: {minExtent: 44, maxExtent: 44}}, mark: {type: 'bar', color: colour('c0'), cornerRadiusEnd: 2}, encoding: {
    x: {field: 'label', type: 'nominal', sort: null, title: chart.x, axis: {labelAngle: 0, labelOverlap: true}}, y: {field: 'value', type: 'quantitative', title: null, axis: {tickCount: 5}},
    tooltip: [{field: 'title', type: 'nominal', title: chart.x}, {field: 'value', type: 'quantitative', format: ',~r'}]}}};
}

function intervals(chart, state, width) {
  const points = chart.points.map(p => ({...p, text: `${short(p.value)} [${short(p.low)}, ${short(p.high)}]`})), side = Math.min(width * .46, 300);
  const y = {field: 'name', type: 'nominal', sort: null, title: null, axis: {labelLimit: side - 8, minExtent: side, maxExtent: side, grid: false}};
  const paint = {field: 'colour', type: 'nominal', scale: null}, x = {field: 'value', type: 'quantitative', title: null, scale: {domain: chart.domain ?? undefined, zero: true}};
  const tooltip = [{field: 'name', type: 'nominal', title: 'of'}, {field: 'text', type: 'nominal', title: 'with its 95 % interval'}];
  points.forEach(p => p.colour = colour(p.kind || 'c0'));
  return {spec: {data: {values: points}, width: width - side - 16, height: {step: 28}, layer: [
    {mark: {type: 'rule', color: colour('soft')}, encoding: {x: {datum: 0}}},
    {mark: {type: 'rule', strokeWidth: 3, opacity: .6}, encoding: {y, x: {...x, field: 'low'}, x2: {field: 'high'}, color: paint, tooltip}},
    {mark: {type: 'point', filled: true, size: 110, opacity: 1}, encoding: {y, x, color: paint, tooltip}}]}};
}

function themed(spec) {
  const axis = {labelColor: colour('soft'), titleColor: colour('soft'), gridColor: colour('line'), domainColor: colour('line'), tickColor: colour('line'), labelFontSize: 12, titleFontSize: 12,
    titleFontWeight: 'normal', titleAnchor: 'end', format: undefined};
  return {$schema: 'https://vega.github.io/schema/vega-lite/v6.json', background: 'transparent', autosize: {type: 'pad'}, padding: {left: 0, top: 6, right: 6, bottom: 4}, ...spec,
    config: {font: 'system-ui, sans-serif', view: {fill: 'transparent', stroke: 'transparent'}, axis, ...spec.config}};
}

function figure(element) {
  const chart = JSON.parse(element.querySelector('script').textContent), plot = element.querySelector('.plot'), caption = element.querySelector('figcaption');
  const state = {view: 0, log: false, hidden: new Set()}, build = {lines, bars, intervals}[chart.kind];
  let view = null;
  async function draw() {
    const {spec, tip} = build(chart, state, plot.clientWidth), tooltip = {disableDefaultStyle: true, ...tip && {formatTooltip: tip}};
    view?.finalize();
    view = await vegaEmbed(plot, themed(spec), {actions: false, ast: true, renderer: 'canvas', defaultStyle: false, logLevel: 1, tooltip});
  }
  if (chart.axes?.length > 1) {
    const choice = make('select');
    choice.setAttribute('aria-label', 'horizontal axis');
    chart.axes.forEach((name, i) => choice.append(Object.assign(make('option', 'over ' + name), {value: i})));
    choice.onchange = () => { state.view = Number(choice.value); draw(); };
    caption.append(choice);
  }
  if (chart.zoom && chart.lines.some(line => line.points.some(p => p.at(-1) > 0))) {
    const box = Object.assign(make('input'), {type: 'checkbox'}), label = make('label');
    box.onchange = () => { state.log = box.checked; draw(); };
    label.append(box, 'log');
    caption.append(label);
  }
  if (chart.lines?.length > 1) {
    const legend = make('figcaption');
    chart.lines.forEach((line, i) => {
      const key = make('button', line.name, 'key');
      key.prepend(make('span', '', `swatch ${line.kind} k${line.colour}`));
      key.setAttribute('aria-pressed', 'true');
      key.onclick = () => { state.hidden.delete(i) || state.hidden.add(i); key.setAttribute('aria-pressed', !state.hidden.has(i)); draw(); };
      legend.append(key);
    });
    caption.after(legend);
  }
  // A finger shows what a mouse shows, and draws in the overview: Vega asks where the pointer was before it went down.
  const move = ({clientX, clientY}) => plot.querySelector('canvas').dispatchEvent(new PointerEvent('pointermove', {clientX, clientY, bubbles: true}));
  plot.addEventListener('pointerdown', event => { if (event.pointerType === 'touch') move(event); }, true);
  for (const kind of ['touchmove', 'touchend']) plot.addEventListener(kind, event => setTimeout(move, 0, event.changedTouches[0]), {passive: true});
  return draw;
}

const figures = [...document.querySelectorAll('figure.chart')].map(figure), redraw = () => Promise.all(figures.map(draw => draw()));
window.ready = redraw();
let wide = innerWidth;
addEventListener('resize', () => { if (wide !== innerWidth) { wide = innerWidth; window.ready = redraw(); } });
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { window.ready = redraw(); });
