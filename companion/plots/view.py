"""The interactive view: a map of layer by token for each site of one pair, as a page that needs no network.

Drawing and script are our own and inline, so a page is small, the same in every run, and works in Jupyter and as a file.
"""

from __future__ import annotations

import html
import json
import re

import pandas as pd

from companion.base.errors import InputError
from companion.plots.style import NAMES, distinct

COLUMNS = ("site", "layer", "position", "token", "share")
CELL, LEFT, BELOW = 16, 46, 84  # pixels: side of a cell, room for layer numbers and for tokens
TITLE = "Share of the total effect that a patch of one cell carries"

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE</title><style>
body{font:13px sans-serif;margin:6px;color:#111;background:#fff} h1{font-size:14px;margin:0 0 6px}
button{font:inherit;margin-right:4px;padding:2px 8px;border:1px solid #888;background:#fff}
button[aria-checked=true]{background:#111;color:#fff} #wide{overflow-x:auto} svg{display:block}
svg text{font:10px sans-serif} svg:focus{outline:2px solid #111} p{margin:6px 0 0;min-height:1.2em}
</style></head><body><h1>@TITLE</h1><div id="sites" role="radiogroup" aria-label="what is patched"></div>
<div id="wide"><svg id="map" tabindex="0" role="img" width="@WIDTH" height="@HEIGHT"></svg></div>
<p id="said" aria-live="polite">@SAID</p>
<p>Red: with the treatment; blue: against it. Point at a cell, or move with the arrow keys.</p><script>
const d=@DATA, C=@CELL, L=@LEFT, svg=document.getElementById("map"), said=document.getElementById("said");
let site=0, row=d.layers.length-1, col=d.tokens.length-1;
function put(kind, attributes, text, parent){
  const e=document.createElementNS("http://www.w3.org/2000/svg",kind);
  for(const k in attributes) e.setAttribute(k,attributes[k]);
  if(text!==undefined) e.textContent=text;
  (parent||svg).appendChild(e); return e;
}
function colour(v){
  if(v===null) return "#DDDDDD";
  const t=Math.min(1,Math.abs(v)/d.bound), end=v>0?[178,24,43]:[33,102,172];
  return "rgb("+end.map(c=>Math.round(255+(c-255)*t)).join(",")+")";
}
function words(r,c){
  const v=d.values[site][r][c];
  const n=v===null?"not measured":v[0].toFixed(2)+(v.length>1?" ["+v[1].toFixed(2)+", "+v[2].toFixed(2)+"]":"");
  return d.sites[site]+", layer "+d.layers[r]+", token "+d.places[c]+" \\u201c"+d.tokens[c]+"\\u201d: "+n;
}
const x=c=>L+c*C, y=r=>(d.layers.length-1-r)*C+4;
function choose(r,c){
  row=r; col=c; said.textContent=words(r,c);
  const cursor=document.getElementById("cursor"); cursor.setAttribute("x",x(c)); cursor.setAttribute("y",y(r));
}
function draw(){
  svg.textContent=""; svg.setAttribute("aria-label",d.sites[site]+": layers by tokens, arrow keys move");
  d.layers.forEach((layer,r)=>{
    if(r%d.step===0) put("text",{x:L-6,y:y(r)+12,"text-anchor":"end"},layer);
    d.tokens.forEach((token,c)=>{
      const v=d.values[site][r][c];
      const e=put("rect",{x:x(c),y:y(r),width:C,height:C,fill:colour(v===null?v:v[0]),stroke:"#EEEEEE"});
      put("title",{},words(r,c),e); e.onmouseenter=()=>choose(r,c);
    });
  });
  const foot=d.layers.length*C+10;
  const turned=(x,y,anchor,text)=>put("text",{transform:"translate("+x+","+y+") rotate(-90)","text-anchor":anchor},text);
  d.tokens.forEach((token,c)=>turned(x(c)+12,foot,"end",token));
  turned(12,d.layers.length*C/2,"middle","layer");
  put("rect",{id:"cursor",width:C,height:C,fill:"none",stroke:"#111","stroke-width":2,"pointer-events":"none"});
  [...document.querySelectorAll("button")].forEach((b,i)=>b.setAttribute("aria-checked",i===site));
}
d.sites.forEach((name,i)=>{
  const b=document.createElement("button"); b.textContent=name; b.setAttribute("role","radio");
  b.onclick=()=>{site=i; draw(); choose(row,col);}; document.getElementById("sites").appendChild(b);
});
const steps={ArrowUp:[1,0],ArrowDown:[-1,0],ArrowLeft:[0,-1],ArrowRight:[0,1]};
svg.onkeydown=event=>{
  const s=steps[event.key]; if(!s) return;
  event.preventDefault(); const held=(v,n)=>Math.max(0,Math.min(n-1,v));
  choose(held(row+s[0],d.layers.length),held(col+s[1],d.tokens.length));
};
draw(); choose(d.best[0],d.best[1]);
</script></body></html>
"""


def interactive_map(table: pd.DataFrame) -> str:
    """The page of one pair's map: a column a token, a row a layer, a button a site; a cell that has no row is grey.

    `table` has a row a cell: site, layer, position, token, share, with `low` and `high` where an interval is known.
    """
    if lacking := [name for name in COLUMNS if name not in table]:
        raise InputError(f"the map of a pair needs a column '{lacking[0]}'; it has {', '.join(table.columns)}")
    sites, layers, places = distinct(table.site), sorted(set(table.layer)), sorted(set(table.position))
    label = dict(zip(table.position, table.token, strict=True))
    numbers = ["share", *(["low", "high"] if {"low", "high"} <= set(table) else [])]
    shown = table[numbers].round(3).to_numpy().tolist()
    cells = dict(zip(zip(table.site, table.layer, table.position, strict=True), shown, strict=True))
    top = table.loc[table.share.abs().idxmax()]
    data = {
        "sites": [NAMES.get(site, site) for site in sites],
        "layers": [int(one) for one in layers],
        "places": [int(one) for one in places],
        "tokens": [str(label[one]) for one in places],
        "values": [[[cells.get((site, row, column)) for column in places] for row in layers] for site in sites],
        "bound": round(float(abs(top.share)), 3) or 1.0,
        "step": 1 if len(layers) <= 12 else 5,
        "best": [layers.index(top.layer), places.index(top.position)],
    }
    said = f"Largest: {NAMES.get(top.site, top.site)}, layer {top.layer}, token {top.position} “{top.token}”: {top.share:.2f}"
    filled = {
        "@TITLE": TITLE, "@SAID": html.escape(said), "@CELL": str(CELL), "@LEFT": str(LEFT),
        "@WIDTH": str(LEFT + CELL * len(places) + 8), "@HEIGHT": str(CELL * len(layers) + BELOW),
        "@DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }  # fmt: skip
    return re.sub("|".join(filled), lambda found: filled[found.group()], PAGE)


def framed(page: str, n_layers: int) -> str:
    """The page inside a notebook's output: in a frame of its own, so that two maps on one page share no names."""
    height = CELL * n_layers + BELOW + 130
    return (
        f'<div><iframe title="{TITLE}" style="width:100%;height:{height}px;border:0" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe></div>'
    )
