// Draws the charts as they come into sight, hides runs, and colours the tokens of samples. All text goes in as text.
"use strict";
(() => {
  const hidden = new Set();
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };

  // ---- charts
  const drawn = new Set();
  const visible = (trace) => (trace.meta && hidden.has(trace.meta.run) ? "legendonly" : true);

  function draw(figure) {
    if (drawn.has(figure)) return;
    drawn.add(figure);
    const spec = JSON.parse(figure.querySelector("script.figure").textContent);
    for (const trace of spec.data) if (trace.meta) trace.visible = visible(trace);
    Plotly.newPlot(figure.querySelector(".chart"), spec.data, spec.layout, config);
  }

  const figures = [...document.querySelectorAll("figure.card")];
  const watch = new IntersectionObserver(
    (entries) => entries.forEach((e) => e.isIntersecting && (watch.unobserve(e.target), draw(e.target))),
    { rootMargin: "600px" },
  );
  figures.forEach((figure) => watch.observe(figure));
  addEventListener("beforeprint", () => figures.forEach(draw));

  // ---- several runs: one legend for the page
  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.addEventListener("click", () => {
      const run = Number(button.dataset.toggle);
      if (!hidden.delete(run)) hidden.add(run);
      button.setAttribute("aria-pressed", String(!hidden.has(run)));
      for (const part of document.querySelectorAll(`.part[data-run="${run}"]`)) part.hidden = hidden.has(run);
      for (const figure of drawn) {
        const chart = figure.querySelector(".chart");
        const mine = chart.data.flatMap((trace, i) => (trace.meta && trace.meta.run === run ? [i] : []));
        if (mine.length) Plotly.restyle(chart, { visible: hidden.has(run) ? "legendonly" : true }, mine);
        else if (!hidden.has(run)) Plotly.Plots.resize(chart); // was drawn, or hidden, without a width
      }
    });
  }

  // ---- samples
  const mix = (from, to, part) => from.map((c, i) => Math.round(c + (to[i] - c) * part));
  const WHITE = [255, 255, 255];
  const RED = [200, 60, 20], BLUE = [0, 95, 160], AMBER = [190, 105, 0], PURPLE = [80, 35, 130];
  const clamp = (x) => Math.max(0, Math.min(1, x));
  const MODES = {
    "log-ratio": {
      of: (s, i) => s.log_ratio[i],
      colour: (x, data) => mix(WHITE, x < 0 ? BLUE : RED, clamp(Math.abs(x) / data.span)),
      ramp: [BLUE, WHITE, RED],
      ends: (data) => [`d ≤ −${data.span} (less likely now)`, `≥ ${data.span} (more likely now)`],
    },
    gate: {
      of: (s, i) => s.gate[i],
      colour: (x) => mix(AMBER, WHITE, clamp(x)),
      ramp: [AMBER, WHITE],
      ends: () => ["w = 0 (held back)", "1 (let through)"],
    },
    flips: {
      of: (s, i) => s.flips_mismatch[i] + s.flips_drift[i],
      colour: (x, data) => mix(WHITE, PURPLE, clamp(x / data.most)),
      ramp: [WHITE, PURPLE],
      ends: (data) => ["no layer flipped", `${data.most} (mismatch + drift)`],
    },
  };

  function element(name, className, text) {
    const e = document.createElement(name);
    if (className) e.className = className;
    if (text !== undefined) e.textContent = text;
    return e;
  }
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const luminance = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b;
  const number = (x, digits) => (x === null ? "unknown" : x.toLocaleString("en", { maximumSignificantDigits: digits || 4 }));

  function paint(card, data, mode) {
    const { of, colour, ramp, ends } = MODES[mode];
    for (const span of card.querySelectorAll(".tokens span")) {
      const x = of(span.sample, span.index);
      const rgb = x === null ? [225, 225, 225] : colour(x, data);
      span.style.background = css(rgb);
      span.style.color = luminance(rgb) < 140 ? "#fff" : "#1f2933";
    }
    const [low, high] = ends(data);
    card.querySelector(".low").textContent = low;
    card.querySelector(".high").textContent = high;
    card.querySelector(".ramp").style.background = `linear-gradient(90deg, ${ramp.map(css).join(", ")})`;
    for (const b of card.querySelectorAll(".switch button")) b.setAttribute("aria-pressed", String(b.textContent === mode));
  }

  const shown = (token) => (token === "" ? "∅" : token.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t"));

  function response(sample) {
    const box = element("div", "response");
    const head = element("div", "head");
    head.append(element("b", "", `reward ${number(sample.reward)}`), `, advantage ${number(sample.advantage)}`);
    head.append(`, ${sample.all} tokens${sample.finish ? `, ended by ${sample.finish}` : ""}, uid ${sample.uid}`);
    if (sample.all > sample.token.length) head.append(` (the first ${sample.token.length} shown)`);
    const text = element("div", "tokens");
    sample.token.forEach((token, i) => {
      const span = element("span", "", shown(token));
      span.sample = sample;
      span.index = i;
      text.append(span);
    });
    box.append(head, text);
    return box;
  }

  function lines(s, i) {
    const signed = (x) => (x === null ? "unknown" : (x < 0 ? "−" : "+") + number(Math.abs(x), 3));
    return [
      `token ${JSON.stringify(s.token[i])} (id ${s.token_id[i]}), position ${s.position[i]}`,
      `log-ratio d  ${signed(s.log_ratio[i])}   gate w ${number(s.gate[i], 3)}`,
      `  engine     ${signed(s.engine[i])}`,
      ...(s.fp8 ? [`  fp8        ${signed(s.fp8[i])}`] : []),
      `  mismatch   ${signed(s.mismatch[i])}   ${s.flips_mismatch[i]} layers flipped`,
      `  update     ${signed(s.update[i])}`,
      `  drift      ${signed(s.drift[i])}   ${s.flips_drift[i]} layers flipped`,
      `log-probability when sampled ${number(s.rollout_logp[i], 3)}`,
    ].join("\n");
  }

  const tip = document.getElementById("tip");
  function point(event) {
    const span = event.target.closest(".tokens span");
    tip.hidden = !span;
    if (!span) return;
    tip.textContent = lines(span.sample, span.index);
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY + height + 26 > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
  }

  for (const card of document.querySelectorAll(".samples")) {
    const data = JSON.parse(card.querySelector("script").textContent);
    const all = data.groups.flatMap((group) => group.samples);
    data.most = Math.max(1, ...all.map((s) => s.token.reduce((top, _, i) => Math.max(top, MODES.flips.of(s, i)), 0)));
    const bar = element("div", "bar");
    const choose = element("div", "switch");
    for (const mode of Object.keys(MODES)) {
      const button = element("button", "", mode);
      button.type = "button";
      button.addEventListener("click", () => paint(card, data, mode));
      choose.append(button);
    }
    const scale = element("div", "scale");
    scale.append(element("span", "low"), element("span", "ramp"), element("span", "high"));
    bar.append(element("b", "", `Step ${data.step}, coloured by`), choose, scale);
    card.append(bar);
    for (const group of data.groups) {
      const prompt = element("div", "prompt");
      prompt.append(element("b", "", "prompt"), element("span", "", group.prompt === null ? "(its rollouts file is not there: log.keep_rollouts)" : group.prompt));
      if (group.answer !== null) prompt.append(element("b", "", "  answer"), element("span", "", group.answer));
      const side = element("div", "side");
      side.append(...group.samples.map(response));
      card.append(prompt, side);
    }
    card.addEventListener("mousemove", point);
    card.addEventListener("click", point);
    card.addEventListener("mouseleave", () => (tip.hidden = true));
    paint(card, data, "log-ratio");
  }
})();
