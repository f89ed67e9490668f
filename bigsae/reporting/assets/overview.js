// Everything about runs and SAEs as wholes: numbers, curves, distributions, costs, options.

const CURVES = [
  ['fvu', 'FVU', 'heldout_fvu', true, number],
  ['loss', 'Loss', null, true, number],
  ['l0', 'L0', 'heldout_l0', false, number],
  ['dead_fraction', 'Dead latents', null, false, percent],
  ['tokens_per_second', 'Tokens per second', null, false, scaled],
  ['lr', 'Learning rate', null, false, number],
];
const NOTES = {
  fvu: 'Fraction of variance unexplained.',
  l0: 'Latents active on a token.',
  dead_fraction: 'Share that did not fire for a long time.',
  tokens_per_second: 'Harvest and training, between two logs.',
};

const about = (saes) => saes.map((sae, index) => ({index, ...sae}));

function heading(content) {
  const {runs, saes} = content;
  const models = [...new Set(runs.map((run) => run.model))];
  const datasets = [...new Set(runs.map((run) => run.dataset))];
  return h('header', {class: 'top'},
    h('div', {class: 'top-row'}, h('span', {class: 'brand'}, 'bigsae report'), themeButton()),
    h('h1', {}, runs.length === 1 && saes.length === 1 ? saes[0].name : runs.map((run) => run.label).join(', ')),
    h('p', {class: 'lead'}, 'Sparse autoencoders on ', h('strong', {}, models.join(', ')), ', text of ',
      h('strong', {}, datasets.join(', ')), '.'),
    h('div', {class: 'pills'}, runs.map((run) => h('span', {class: `pill ${run.status}`, title: run.reason},
      runs.length > 1 ? `${run.label}: ` : '', run.status,
      run.status === 'finished' ? ` · ${scaled(run.tokens)} tokens`
        : ` · ${scaled(run.tokens)} of ${scaled(run.planned)} tokens`))));
}

function themeButton() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  const button = h('button', {type: 'button', class: 'quiet'});
  const name = () => button.replaceChildren(dark() ? 'Light' : 'Dark');
  button.setAttribute('aria-label', 'Switch between light and dark');
  button.addEventListener('click', () => { root.dataset.theme = dark() ? 'light' : 'dark'; name(); });
  name();
  return button;
}

function shape(sae) {
  if (!sae.d_sae) return 'weights not written yet';
  const output = sae.d_out ? ` → ${count(sae.d_out)}` : '';
  return `${sae.kind}${sae.k ? ` k ${sae.k}` : ''}, ${count(sae.d_in)} → ${count(sae.d_sae)}${output}`;
}

function facts(sae) {
  const {last} = sae;
  return [
    ['Held-out FVU', number(last.heldout_fvu)],
    ['FVU', number(last.fvu)],
    ['L0', number(last.l0)],
    ['Dead', last.dead_fraction === undefined ? '–' : percent(last.dead_fraction)],
    ['Tokens', last.tokens === undefined ? '–' : scaled(last.tokens)],
    ['Tokens/s', sae.speed ? scaled(sae.speed) : '–'],
  ];
}

function numbers(content, hidden, redraw) {
  const saes = about(content.saes).map((sae) => {
    const {time} = content.runs[sae.run];
    return {...sae, speed: time && time.tokens_per_second};
  });
  if (saes.length === 1) {
    return h('section', {id: 'numbers'}, h('h2', {class: 'visually-hidden'}, 'Numbers'),
      h('dl', {class: 'tiles'}, facts(saes[0]).map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value)))),
      h('p', {class: 'note'}, `${shape(saes[0])}. The newest values; tokens/s over the whole run.`));
  }
  const rows = saes.map((sae) => {
    const box = h('input', {type: 'checkbox', checked: true, 'aria-label': `Show ${sae.label}`, onchange: () => {
      if (box.checked) hidden.delete(sae.index); else hidden.add(sae.index);
      redraw();
    }});
    return h('tr', {}, h('th', {scope: 'row'}, h('label', {}, box, swatch(sae.index), h('span', {}, sae.label),
      h('small', {}, shape(sae)))), facts(sae).map(([, value]) => h('td', {}, value)));
  });
  return h('section', {id: 'numbers'}, h('h2', {}, 'Numbers'), h('div', {class: 'scroll', tabindex: 0, role: 'group',
    'aria-label': 'Table of all SAEs'}, h('table', {},
    h('thead', {}, h('tr', {}, h('th', {scope: 'col'}, 'SAE'), facts(saes[0]).map(([name]) => h('th', {scope: 'col'}, name)))),
    h('tbody', {}, rows))),
  h('p', {class: 'note'}, 'The newest values; tokens/s over the whole run. The boxes show and hide curves.'));
}

function card(title, note, plot) {
  return h('figure', {class: 'card'}, h('figcaption', {}, h('b', {}, title), note ? h('span', {}, note) : null), plot);
}

function legend(saes) {
  if (saes.length < 2) return null;
  return h('div', {class: 'legend'}, saes.map((sae) => h('span', {}, swatch(sae.index), sae.label)));
}

function curvesOf(saes, name, heldout) {
  const one = (sae, metric, extra) => {
    const curve = sae.curves[metric];
    return curve ? [{index: sae.index, label: sae.label, x: curve.x, y: curve.y, ...extra}] : [];
  };
  return saes.flatMap((sae) => [...one(sae, name, {}),
    ...(heldout ? one(sae, heldout, {marks: true, label: `${sae.label}, held out`}) : [])]);
}

function learning(content, hidden, state) {
  const saes = about(content.saes).filter((sae) => !hidden.has(sae.index));
  const known = new Set(CURVES.flatMap(([name, , heldout]) => [name, heldout]));
  const others = [...new Set(saes.flatMap((sae) => Object.keys(sae.curves)))].filter((name) => !known.has(name));
  const draw = ([name, title, heldout, mayBeLog, format]) => {
    const series = curvesOf(saes, name, heldout);
    if (!series.length) return null;
    const held = series.some((one) => one.marks) ? ' Points: held-out text.' : '';
    return card(title, (NOTES[name] || '') + held,
      lineChart({title, series, log: mayBeLog && state.log, format}).element);
  };
  const box = h('input', {type: 'checkbox', checked: state.log, onchange: () => { state.log = box.checked; state.redraw(); }});
  const grid = CURVES.map(draw).filter(Boolean);
  const more = others.map((name) => draw([name, name.replaceAll('_', ' '), null, false, number])).filter(Boolean);
  const details = more.length ? h('details', {open: state.more, ontoggle: () => { state.more = details.open; }},
    h('summary', {}, `Other metrics (${more.length})`), h('div', {class: 'grid-of-cards'}, more)) : null;
  return h('section', {id: 'curves'},
    h('div', {class: 'section-row'}, h('h2', {}, 'Learning curves'),
      grid.length ? h('label', {class: 'switch'}, box, 'logarithmic FVU and loss') : null),
    legend(saes),
    grid.length ? h('div', {class: 'grid-of-cards'}, grid) : h('p', {class: 'empty'}, 'Nothing has been logged yet.'), details);
}

function distributions(content, hidden) {
  const saes = about(content.saes).filter((sae) => sae.pictures && !hidden.has(sae.index));
  const picture = (name, title, note, options = {}) => {
    const series = saes.filter((sae) => sae.pictures[name]).map((sae) => ({index: sae.index, label: sae.label, ...sae.pictures[name]}));
    return series.length ? card(title, note, histogram({title, series, ...options}).element) : null;
  };
  const never = saes.filter((sae) => sae.pictures.density).map((sae) => sae.pictures.never);
  const [least, most] = [Math.min(...never), Math.max(...never)].map(percent);
  const exponent = (value) => (Number.isInteger(value) ? `1e${value}` : number(10 ** value, 2));
  const pictures = [
    picture('density', 'Firing density', `Share of tokens on which a latent fires. ${least === most ? least : `${least} to ${most}`} of all never did.`,
      {xText: exponent, xTicks: [-7, -6, -5, -4, -3, -2, -1, 0]}),
    picture('norm', 'Decoder norms', 'Of the decoder row of each latent.'),
    picture('nearest', 'Nearest latent', 'Cosine of each decoder row with the one most like it.'),
    picture('encoder', 'Encoder and decoder', 'Cosine of each latent’s two rows.'),
  ].filter(Boolean);
  return h('section', {id: 'distributions'}, h('h2', {}, 'Latents as a whole'), legend(saes), pictures.length
    ? h('div', {class: 'grid-of-cards four'}, pictures)
    : h('p', {class: 'empty'}, 'No weights yet: training writes them at its end.'));
}

function stacked(parts, text) {
  const total = parts.reduce((sum, [, value]) => sum + value, 0);
  const shown = parts.map((part, index) => [...part, index]).filter(([, value]) => value > 0);
  return h('div', {}, h('div', {class: 'stack', role: 'img', 'aria-label': shown.map(([n, v]) => `${n} ${text(v)}`).join(', ')},
    shown.map(([name, value, index]) => h('div', {title: `${name}: ${text(value)}`,
      style: {'flex-grow': value / total, background: color(index)}}))),
  h('ul', {class: 'key'}, shown.map(([name, value, index]) => h('li', {}, h('i', {style: {background: color(index)}}),
    name, h('b', {}, text(value)), h('small', {}, percent(value / total))))));
}

function costs(content) {
  const cards = content.runs.map((run) => {
    const {time, memory} = run;
    const ranks = memory.ranks === 1 ? 'one rank' : `each of ${memory.ranks} ranks`;
    return h('div', {class: 'card'}, content.runs.length > 1 ? h('h3', {}, run.label) : null,
      h('h4', {}, 'Time'), time ? stacked([['language model', time.lm], ['SAEs', time.sae]], duration)
        : h('p', {class: 'empty'}, 'Nothing has been logged yet.'),
      h('h4', {}, 'Memory'), memory.parts
        ? [stacked(memory.parts, bytes), h('p', {class: 'note'}, `Of ${ranks}, reckoned from the configuration as `
          + `bigsae.plan does${memory.known ? '' : '; without a checkpoint as on one rank'}. Forwards and steps take turns.`)]
        : h('p', {class: 'empty'}, `Not known: ${memory.unknown}`));
  });
  return h('section', {id: 'costs'}, h('h2', {}, 'Time and memory'), h('div', {class: 'grid-of-cards wide'}, cards));
}

function options(content) {
  const {runs} = content;
  const names = [...new Set(runs.flatMap((run) => run.options.map(([name]) => name)))];
  const values = runs.map((run) => new Map(run.options));
  const differs = (name) => new Set(values.map((value) => value.get(name))).size > 1;
  return h('section', {id: 'options'}, h('h2', {}, 'Options'), h('details', {},
    h('summary', {}, runs.length > 1 ? `All ${names.length}; marked: ${names.filter(differs).length} that differ` : `All ${names.length}`),
    h('div', {class: 'scroll', tabindex: 0, role: 'group', 'aria-label': 'Table of options'}, h('table', {class: 'options'},
      runs.length > 1 ? h('thead', {}, h('tr', {}, h('th', {}), runs.map((run) => h('th', {scope: 'col'}, run.label)))) : null,
      h('tbody', {}, names.map((name) => h('tr', {class: differs(name) ? 'differs' : null},
        h('th', {scope: 'row'}, `--${name.replaceAll('_', '-')}`), values.map((value) => h('td', {}, value.get(name) ?? '–')))))))));
}
