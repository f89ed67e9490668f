// Line charts and histograms, drawn as SVG in the width that they have and drawn anew when that changes.

const MARGIN = {right: 12, top: 10, bottom: 26};
const DIGIT_WIDTH = 6.6;
const LEAST_BETWEEN_TICKS = 42;

function niceTicks(low, high, most) {
  const rough = (high - low) / Math.max(most, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((candidate) => candidate >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  const powers = Math.log10(high / low);
  const multiples = powers > 2.5 ? [1] : powers > 1 ? [1, 3] : [1, 2, 3, 5, 7];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    multiples.forEach((m) => ticks.push(m * 10 ** power));
  }
  const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  return inside.length > 2 ? inside : niceTicks(low, high, 4);
}

function scale(domain, range, log) {
  const f = log ? Math.log : (value) => value;
  const [a, b] = domain.map(f);
  return (value) => range[0] + ((f(value) - a) / (b - a || 1)) * (range[1] - range[0]);
}

// A frame with axes that calls `draw(plot)` for what is in it: plot has x, y (scales), svg, width, height.
function chart(options) {
  const box = h('div', {class: 'plot', style: {height: `${options.height || 190}px`}});
  let drawn = 0;
  const draw = () => {
    const width = box.clientWidth;
    if (!width) return;
    drawn = width;
    const height = options.height || 190;
    const yTicks = options.yTicks || (options.log ? logTicks(...options.y) : niceTicks(...options.y, height / 45));
    const left = 10 + DIGIT_WIDTH * Math.max(4, ...yTicks.map((tick) => options.yText(tick).length));
    const right = width - MARGIN.right;
    const bottom = height - MARGIN.bottom;
    const plot = {
      left, right, bottom,
      x: scale(options.x, [left, right]),
      y: scale(options.y, [bottom, MARGIN.top], options.log),
      svg: svg('svg', {width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': options.label}),
    };
    const xTicks = options.xTicks || niceTicks(...options.x, width / 90);
    yTicks.forEach((tick) => plot.svg.append(
      svg('line', {class: 'grid', x1: plot.left, x2: right, y1: plot.y(tick), y2: plot.y(tick)}),
      svg('text', {class: 'tick', x: plot.left - 7, y: plot.y(tick) + 4, 'text-anchor': 'end'}, options.yText(tick))));
    const every = Math.ceil((xTicks.length * LEAST_BETWEEN_TICKS) / (right - left));
    xTicks.filter((_, i) => (xTicks.length - 1 - i) % every === 0).forEach((tick) => {
      const x = plot.x(tick);
      const anchor = x > right - 16 ? 'end' : 'middle';
      plot.svg.append(svg('text', {class: 'tick', x: anchor === 'end' ? right + 6 : x, y: bottom + 18,
        'text-anchor': anchor}, options.xText(tick)));
    });
    plot.svg.append(svg('line', {class: 'axis', x1: plot.left, x2: right, y1: bottom, y2: bottom}));
    options.draw(plot);
    box.replaceChildren(plot.svg);
  };
  new ResizeObserver(() => { if (box.clientWidth !== drawn) draw(); }).observe(box);
  return {element: box, draw};
}

function extent(values, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (log && value <= 0) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (low === 0 && high === 0) return [0, 0.05];
  if (low === high) return log ? [low / 2, high * 2] : [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
  const room = 0.05 * (high - low);
  return log ? [low / 1.1, high * 1.1] : [low >= 0 && low < 0.3 * high ? 0 : low - room, high + room];
}

// series: [{index, label, x, y, marks}], x in tokens; `marks` are measurements far apart, drawn with points.
function lineChart({title, series, log, format = number}) {
  const xs = series.flatMap((one) => one.x);
  const domain = extent(series.flatMap((one) => one.y), log);
  return chart({
    label: `${title}: ${series.map((one) => `${one.label} ${format(one.y[one.y.length - 1])}`).join(', ')}`,
    x: [0, Math.max(...xs, 1)], y: domain, log, xText: scaled, yText: format,
    draw(plot) {
      const shown = (one, i) => !log || one.y[i] > 0;
      series.forEach((one) => {
        const points = one.x.map((x, i) => [plot.x(x), shown(one, i) ? plot.y(one.y[i]) : null]);
        let path = '';
        points.forEach(([x, y], i) => {
          if (y !== null) path += `${path && points[i - 1][1] !== null ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`;
        });
        const dash = one.marks ? '2 3' : dashes(one.index);
        plot.svg.append(svg('path', {class: 'line', d: path, style: {stroke: color(one.index), 'stroke-dasharray': dash}}));
        if (one.marks || points.length === 1) {
          points.filter(([, y]) => y !== null).forEach(([x, y]) => plot.svg.append(
            svg('circle', {class: 'mark', cx: x, cy: y, r: 3.5, style: {stroke: color(one.index)}})));
        }
      });
      follow(plot, series, format);
    },
  });
}

// A line under the pointer, and the values nearest to it.
function follow(plot, series, format) {
  const rule = svg('line', {class: 'rule', y1: MARGIN.top, y2: plot.bottom, visibility: 'hidden'});
  plot.svg.append(rule);
  const hide = () => { rule.setAttribute('visibility', 'hidden'); tooltip.hide(); };
  plot.svg.addEventListener('pointerleave', hide);
  plot.svg.addEventListener('pointermove', (event) => {
    const at = event.clientX - plot.svg.getBoundingClientRect().left;
    let nearest = null;
    series.forEach((one) => one.x.forEach((x) => {
      if (nearest === null || Math.abs(plot.x(x) - at) < Math.abs(plot.x(nearest) - at)) nearest = x;
    }));
    if (nearest === null) return;
    rule.setAttribute('x1', plot.x(nearest));
    rule.setAttribute('x2', plot.x(nearest));
    rule.setAttribute('visibility', 'visible');
    const lines = series.flatMap((one) => {
      const i = one.x.reduce((best, x, j) => (Math.abs(x - nearest) < Math.abs(one.x[best] - nearest) ? j : best), 0);
      // Another curve's neighbourhood: nothing was measured there.
      if (Math.abs(plot.x(one.x[i]) - plot.x(nearest)) > 12) return [];
      return [h('div', {class: 'tip-line'}, swatch(one.index), h('span', {}, one.label), h('b', {}, format(one.y[i])))];
    });
    tooltip.show(event.clientX, event.clientY, h('div', {class: 'tip-head'}, `${count(nearest)} tokens`), ...lines);
  });
}

// series: [{index, label, lo, hi, share}]: outlines over shared bins, filled where there is one alone.
function histogram({title, series, xText = number, xTicks}) {
  const {lo, hi} = series[0];
  const highest = Math.max(...series.flatMap((one) => one.share), 1e-9);
  return chart({
    label: title, x: [lo, hi], y: [0, highest * 1.06], xText, xTicks,
    yText: (value) => `${number(100 * value)} %`,
    draw(plot) {
      series.forEach((one) => {
        const edge = (i) => plot.x(lo + ((hi - lo) * i) / one.share.length).toFixed(1);
        let path = `M${edge(0)} ${plot.bottom}`;
        one.share.forEach((share, i) => { path += `V${plot.y(share).toFixed(1)}H${edge(i + 1)}`; });
        path += `V${plot.bottom}`;
        plot.svg.append(svg('path', {class: 'step', d: path, style: {
          stroke: color(one.index), fill: color(one.index), 'fill-opacity': series.length > 1 ? 0.06 : 0.22,
          'stroke-dasharray': dashes(one.index),
        }}));
      });
      overBins(plot, series, lo, hi, xText);
    },
  });
}

function overBins(plot, series, lo, hi, xText) {
  plot.svg.addEventListener('pointerleave', () => tooltip.hide());
  plot.svg.addEventListener('pointermove', (event) => {
    const at = event.clientX - plot.svg.getBoundingClientRect().left;
    const bins = series[0].share.length;
    const bin = Math.floor(((at - plot.left) / (plot.right - plot.left)) * bins);
    if (bin < 0 || bin >= bins) return tooltip.hide();
    const edge = (i) => xText(lo + ((hi - lo) * i) / bins);
    tooltip.show(event.clientX, event.clientY, h('div', {class: 'tip-head'}, `${edge(bin)} to ${edge(bin + 1)}`),
      ...series.map((one) => h('div', {class: 'tip-line'}, swatch(one.index), h('span', {}, one.label),
        h('b', {}, percent(one.share[bin])))));
  });
}

// Counts of activations from 0 to `most`, on a logarithmic axis: strong ones are rare and matter most.
function activationHistogram(counts, most) {
  const highest = Math.max(...counts, 1);
  const level = (value) => (value > 0 ? Math.log10(value) + 0.3 : 0);
  const powers = [0, 1, 2, 3, 4, 5, 6, 7].filter((p) => 10 ** p <= highest);
  return chart({
    label: `Activations from 0 to ${number(most)}`, height: 132, x: [0, most || 1], y: [0, level(highest) * 1.05],
    xText: number, yTicks: powers.map((p) => p + 0.3), yText: (tick) => scaled(Math.round(10 ** (tick - 0.3))),
    draw(plot) {
      counts.forEach((value, i) => {
        const [a, b] = [i, i + 1].map((edge) => plot.x((most * edge) / counts.length));
        const top = plot.y(level(value));
        plot.svg.append(svg('rect', {class: 'bar', x: a + 0.5, width: Math.max(b - a - 1, 0.5), y: top,
          height: Math.max(plot.bottom - top, 0), style: {'fill-opacity': 0.35 + (0.65 * i) / counts.length}}));
      });
      plot.svg.addEventListener('pointerleave', () => tooltip.hide());
      plot.svg.addEventListener('pointermove', (event) => {
        const at = event.clientX - plot.svg.getBoundingClientRect().left;
        const i = Math.floor(((at - plot.left) / (plot.right - plot.left)) * counts.length);
        if (i < 0 || i >= counts.length) return tooltip.hide();
        const [a, b] = [i, i + 1].map((edge) => number((most * edge) / counts.length));
        tooltip.show(event.clientX, event.clientY, h('div', {class: 'tip-head'}, `${a} to ${b}`),
          h('div', {}, `${count(counts[i])} tokens`));
      });
    },
  });
}
