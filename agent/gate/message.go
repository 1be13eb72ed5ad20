package gate

import (
	"bytes"
	"fmt"
	"net/http"
	"sync"
	"unsafe"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// maxHeadBytes bounds a message's head.
const maxHeadBytes = 64 << 10

// head is the first part of an HTTP/1 message, as it was sent. It points into b, and
// is good as long as that is.
type head struct {
	b      []byte  // from the start line to the empty line, both included
	fields []field // in the order in which they came

	minor  int // of HTTP/1
	status int // of a response
	verb   span
	target span

	length     int64 // Content-Length, -1 without one
	lengthAt   span
	chunked    bool
	ambiguous  bool // of a response: both
	close      bool // Connection: close
	keepAlive  bool // Connection: keep-alive
	upgrade    bool // Connection: upgrade, and Upgrade
	h2c        bool // Upgrade: h2c
	expect     bool // Expect: 100-continue
	connection bool // there is one

	// Where the last of these is in fields, -1 without one.
	forwardedFor, forwardedProto, forwarded int
}

// heads are held while a message is under way.
var heads = sync.Pool{New: func() any { return new(head) }}

// span is a part of head.b.
type span struct{ from, to int }

// field is a header line.
type field struct {
	start, end  int // with its CRLF
	name, value span
	drop        bool // is not passed on
}

// badMessage tells why a message is not served, and with which status.
type badMessage struct {
	status int
	why    string
}

func (e *badMessage) Error() string { return e.why }

func bad(format string, args ...any) error {
	return &badMessage{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

func (h *head) of(s span) []byte { return h.b[s.from:s.to] }

// text is a part as a string without a copy: it is good as long as h.b is.
func (h *head) text(s span) string {
	b := h.of(s)
	return unsafe.String(unsafe.SliceData(b), len(b))
}

// method implements fields.
func (h *head) method() string { return h.text(h.verb) }

// path implements fields. A request to a proxy has the whole URL in its place.
func (h *head) path() string {
	t := h.text(h.target)
	for i := range len(t) {
		if t[i] == '?' {
			t = t[:i]
			break
		}
	}
	if len(t) > 0 && t[0] != '/' {
		if i := bytes.Index([]byte(t), []byte("://")); i > 0 {
			t = t[i+3:]
			if slash := bytes.IndexByte([]byte(t), '/'); slash >= 0 {
				return t[slash:]
			}
			return "/"
		}
	}
	return t
}

// value implements fields.
func (h *head) value(name string, i int) (value string, next int, ok bool) {
	for ; i < len(h.fields); i++ {
		if f := &h.fields[i]; f.name.to-f.name.from == len(name) && equalFold(h.of(f.name), name) {
			return h.text(f.value), i + 1, true
		}
	}
	return "", i, false
}

// equalFold compares with a name in lower case.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, x := range b {
		if x >= 'A' && x <= 'Z' {
			x += 'a' - 'A'
		}
		if x != lower[i] {
			return false
		}
	}
	return true
}

// headEnd looks for the empty line that ends a head, from an index on, and tells
// where it ends; 0: not yet. In a request each line must end in CRLF, since what
// others take for a line's end may differ.
func headEnd(b []byte, from int, strict bool) (int, error) {
	for i := from; ; {
		n := bytes.IndexByte(b[i:], '\n')
		if n < 0 {
			return 0, nil
		}
		i += n
		if strict && (i == 0 || b[i-1] != '\r') {
			return 0, bad("a line ends in LF without CR")
		}
		if i >= 1 && b[i-1] == '\n' || i >= 2 && b[i-1] == '\r' && b[i-2] == '\n' {
			return i + 1, nil
		}
		i++
	}
}

// reset has h begin anew with b.
func (h *head) reset(b []byte) {
	*h = head{b: b, fields: h.fields[:0], length: -1, forwardedFor: -1, forwardedProto: -1, forwarded: -1}
}

// parseRequest reads b, a head that headEnd found. What two readers could understand
// in two ways is refused.
func (h *head) parseRequest(b []byte) error {
	h.reset(b)
	line, rest := cutLine(b, 0)
	first := bytes.IndexByte(b[:line], ' ')
	last := bytes.LastIndexByte(b[:line], ' ')
	if first <= 0 || last <= first+1 {
		return bad("the request line is no METHOD TARGET HTTP/1.1")
	}
	h.verb, h.target = span{0, first}, span{first + 1, last}
	if !intercept.IsToken(h.method()) {
		return bad("the method is none")
	}
	switch version := b[last+1 : line]; string(version) {
	case "HTTP/1.1":
		h.minor = 1
	case "HTTP/1.0":
	default:
		if bytes.HasPrefix(version, []byte("HTTP/")) {
			return &badMessage{http.StatusHTTPVersionNotSupported, "the version is neither HTTP/1.1 nor HTTP/1.0"}
		}
		return bad("the request line does not end in a version")
	}
	for _, x := range h.of(h.target) {
		if x <= ' ' || x == 0x7f {
			return bad("the request's target has a space or a control character")
		}
	}
	if h.method() == http.MethodConnect {
		return &badMessage{http.StatusMethodNotAllowed, "CONNECT is for proxies"}
	}
	if t := h.text(h.target); t[0] != '/' && t != "*" && !absolute(t) {
		return bad("the request's target is neither a path nor a URL")
	}
	if err := h.parseFields(rest, true); err != nil {
		return err
	}
	hosts := 0
	for _, i, ok := h.value("host", 0); ok; _, i, ok = h.value("host", i) {
		hosts++
	}
	switch {
	case hosts > 1:
		return bad("there is more than one Host")
	case hosts == 0 && h.minor == 1:
		return bad("there is no Host")
	case h.chunked && h.length >= 0:
		return bad("there are both Content-Length and Transfer-Encoding")
	case h.chunked && h.minor == 0:
		return bad("HTTP/1.0 has no Transfer-Encoding")
	}
	return nil
}

func absolute(t string) bool {
	return len(t) > 8 && (equalFold([]byte(t[:7]), "http://") || equalFold([]byte(t[:8]), "https://"))
}

// parseResponse reads b, a head that headEnd found. It is tolerant where that does
// not matter for where the response ends.
func (h *head) parseResponse(b []byte) error {
	h.reset(b)
	line, rest := cutLine(b, 0)
	if line < len("HTTP/1.1 200") || !bytes.HasPrefix(b, []byte("HTTP/1.")) || b[8] != ' ' || b[7] != '0' && b[7] != '1' {
		return bad("the status line is none")
	}
	h.minor = int(b[7] - '0')
	for _, x := range b[9:12] {
		if x < '0' || x > '9' {
			return bad("the status is none")
		}
		h.status = h.status*10 + int(x-'0')
	}
	if h.status < 100 || line > 12 && b[12] != ' ' {
		return bad("the status is none")
	}
	if err := h.parseFields(rest, false); err != nil {
		return err
	}
	if h.chunked && h.length >= 0 {
		h.ambiguous, h.length = true, -1
	}
	return nil
}

// cutLine tells where the line that begins at an index ends, without and with its
// CRLF.
func cutLine(b []byte, at int) (end, next int) {
	n := bytes.IndexByte(b[at:], '\n')
	if n < 0 {
		return len(b), len(b)
	}
	end, next = at+n, at+n+1
	if end > at && b[end-1] == '\r' {
		end--
	}
	return end, next
}

func (h *head) parseFields(at int, strict bool) error {
	upgrade := false
	for {
		end, next := cutLine(h.b, at)
		if end == at || next == at {
			break
		}
		line := h.b[at:end]
		colon := bytes.IndexByte(line, ':')
		if colon <= 0 || line[0] == ' ' || line[0] == '\t' {
			if strict {
				return bad("a header line has no name, or continues the one before")
			}
			at = next
			continue
		}
		f := field{start: at, end: next, name: span{at, at + colon}, value: span{at + colon + 1, end}}
		for f.value.from < f.value.to && isSpace(h.b[f.value.from]) {
			f.value.from++
		}
		for f.value.to > f.value.from && isSpace(h.b[f.value.to-1]) {
			f.value.to--
		}
		if strict {
			if !intercept.IsToken(h.text(f.name)) {
				return bad("a header's name is none")
			}
			for _, x := range h.of(f.value) {
				if x < ' ' && x != '\t' || x == 0x7f {
					return bad("the value of %s has a control character", h.of(f.name))
				}
			}
		}
		h.fields = append(h.fields, f)
		if err := h.understand(len(h.fields)-1, &upgrade); err != nil {
			return err
		}
		at = next
	}
	h.upgrade = h.upgrade && upgrade
	return nil
}

func isSpace(b byte) bool { return b == ' ' || b == '\t' }

// understand takes from a field what matters for the connection. upgrade tells that
// there is an Upgrade; h.upgrade that Connection says so.
func (h *head) understand(i int, upgrade *bool) error {
	f := &h.fields[i]
	name := h.of(f.name)
	// By length first: most fields are none of these.
	switch len(name) {
	case len("upgrade"):
		if equalFold(name, "upgrade") {
			*upgrade = true
			h.h2c = h.h2c || hasToken(h.of(f.value), "h2c")
		}
	case len("connection"):
		if equalFold(name, "connection") {
			h.connection = true
			v := h.of(f.value)
			h.close = h.close || hasToken(v, "close")
			h.keepAlive = h.keepAlive || hasToken(v, "keep-alive")
			h.upgrade = h.upgrade || hasToken(v, "upgrade")
		}
	case len("expect"):
		h.expect = h.expect || equalFold(name, "expect") && equalFold(h.of(f.value), "100-continue")
	case len("content-length"):
		if equalFold(name, "content-length") {
			return h.contentLength(f.value)
		}
	case len("transfer-encoding"):
		switch {
		case equalFold(name, "transfer-encoding"):
			if h.chunked || !equalFold(h.of(f.value), "chunked") {
				return &badMessage{http.StatusNotImplemented, "the Transfer-Encoding is another than chunked"}
			}
			h.chunked = true
		case equalFold(name, "x-forwarded-proto"):
			h.forwardedProto = i
		}
	case len("x-forwarded-for"):
		if equalFold(name, "x-forwarded-for") {
			h.forwardedFor = i
		}
	case len("forwarded"):
		if equalFold(name, "forwarded") {
			h.forwarded = i
		}
	}
	return nil
}

func (h *head) contentLength(at span) error {
	v := h.of(at)
	if len(v) == 0 || len(v) > 18 {
		return bad("the Content-Length is no number")
	}
	n := int64(0)
	for _, x := range v {
		if x < '0' || x > '9' {
			return bad("the Content-Length is no number")
		}
		n = n*10 + int64(x-'0')
	}
	if h.length >= 0 && (h.length != n || !bytes.Equal(v, h.of(h.lengthAt))) { // 05 is not 5 to everybody
		return bad("there are two Content-Lengths")
	}
	if h.length < 0 {
		h.length, h.lengthAt = n, at
	}
	return nil
}

// hasToken tells whether a list has a token, which is in lower case.
func hasToken(list []byte, token string) bool {
	for len(list) > 0 {
		item := list
		if i := bytes.IndexByte(list, ','); i >= 0 {
			item, list = list[:i], list[i+1:]
		} else {
			list = nil
		}
		for len(item) > 0 && isSpace(item[0]) {
			item = item[1:]
		}
		for len(item) > 0 && isSpace(item[len(item)-1]) {
			item = item[:len(item)-1]
		}
		if equalFold(item, token) {
			return true
		}
	}
	return false
}

// persists tells whether who sent h keeps the connection.
func (h *head) persists() bool { return !h.close && (h.minor == 1 || h.keepAlive) }

// dropFields has fields with one of these names, in lower case, not be passed on.
func (h *head) dropFields(names ...string) {
	for i := range h.fields {
		for _, name := range names {
			if equalFold(h.of(h.fields[i].name), name) {
				h.fields[i].drop = true
			}
		}
	}
}
