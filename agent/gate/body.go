package gate

// body finds the end of a message's body (RFC 9112, 6.3) in bytes that pass as they
// are.
type body struct {
	kind int8
	done bool

	state  int8  // of chunked
	left   int64 // of the length, or of a chunk
	digits int8  // of a chunk's size
	line   int   // bytes of a chunk's extensions, or of all trailers
}

// Kinds of a body.
const (
	bodyLength = iota
	bodyChunked
	bodyUntilClose
)

// States of a chunked body: what comes next.
const (
	chunkSize  = iota
	chunkSpace // before extensions
	chunkExtension
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	trailerStart
	trailerLine
	trailerLF
	chunkedLF
)

// Bounds, in bytes, of a chunk's extensions and of a body's trailers.
const (
	maxExtensions = 4 << 10
	maxTrailers   = 16 << 10
)

func lengthBody(n int64) body { return body{kind: bodyLength, left: n, done: n == 0} }

// requestBody is what comes after a request's head.
func requestBody(h *head) body {
	if h.chunked {
		return body{kind: bodyChunked}
	}
	return lengthBody(max(h.length, 0))
}

// responseBody is what comes after a response's head.
func responseBody(h *head, toHEAD bool) body {
	switch {
	case toHEAD, h.status < 200, h.status == 204, h.status == 304:
		return lengthBody(0)
	case h.chunked:
		return body{kind: bodyChunked}
	case h.length >= 0:
		return lengthBody(h.length)
	}
	return body{kind: bodyUntilClose}
}

// take is how many bytes at the beginning of p are the body's.
func (b *body) take(p []byte) (int, error) {
	switch {
	case b.done:
		return 0, nil
	case b.kind == bodyUntilClose:
		return len(p), nil
	case b.kind == bodyLength:
		n := min(int64(len(p)), b.left)
		b.left -= n
		b.done = b.left == 0
		return int(n), nil
	}
	for i := 0; i < len(p); {
		if b.state == chunkData {
			n := min(int64(len(p)-i), b.left)
			b.left -= n
			i += int(n)
			if b.left == 0 {
				b.state = chunkDataCR
			}
			continue
		}
		if err := b.step(p[i]); err != nil {
			return i, err
		}
		i++
		if b.done {
			return i, nil
		}
	}
	return len(p), nil
}

// step takes a byte that is not a chunk's data.
func (b *body) step(x byte) error {
	switch b.state {
	case chunkSize:
		if d := hexDigit(x); d >= 0 {
			if b.digits++; b.digits > 15 {
				return bad("a chunk's size is too large")
			}
			b.left = b.left<<4 | int64(d)
			return nil
		}
		if b.digits == 0 {
			return bad("a chunk's size is no number")
		}
		b.line = 0
		switch x {
		case '\r':
			b.state = chunkSizeLF
		case ';':
			b.state = chunkExtension
		case ' ', '\t':
			b.state = chunkSpace
		default:
			return bad("a chunk's size is no number")
		}
	case chunkSpace:
		if b.line++; b.line > maxExtensions {
			return bad("a chunk's extensions are too long")
		}
		switch {
		case x == '\r':
			b.state = chunkSizeLF
		case x == ';':
			b.state = chunkExtension
		case !isSpace(x):
			return bad("a chunk's size is no number")
		}
	case chunkExtension:
		if b.line++; b.line > maxExtensions {
			return bad("a chunk's extensions are too long")
		}
		switch {
		case x == '\r':
			b.state = chunkSizeLF
		case x < ' ' && x != '\t' || x == 0x7f:
			return bad("a chunk's extension has a control character")
		}
	case chunkSizeLF:
		if x != '\n' {
			return bad("a chunk's size does not end in CRLF")
		}
		b.digits, b.line = 0, 0
		if b.state = chunkData; b.left == 0 {
			b.state = trailerStart
		}
	case chunkDataCR:
		if x != '\r' {
			return bad("a chunk does not end in CRLF")
		}
		b.state = chunkDataLF
	case chunkDataLF:
		if x != '\n' {
			return bad("a chunk does not end in CRLF")
		}
		b.state = chunkSize
	case trailerStart, trailerLine:
		return b.trailer(x)
	case trailerLF, chunkedLF:
		if x != '\n' {
			return bad("a trailer does not end in CRLF")
		}
		b.done = b.state == chunkedLF
		b.state = trailerStart
	}
	return nil
}

func (b *body) trailer(x byte) error {
	if b.line++; b.line > maxTrailers {
		return bad("the trailers are too long")
	}
	begin := b.state == trailerStart
	switch {
	case x == '\r' && begin:
		b.state = chunkedLF
	case x == '\r':
		b.state = trailerLF
	case x < ' ' && x != '\t' || x == 0x7f, begin && (isSpace(x) || x == ':'):
		return bad("a trailer is no header line")
	default:
		b.state = trailerLine
	}
	return nil
}

func hexDigit(x byte) int {
	switch {
	case x >= '0' && x <= '9':
		return int(x - '0')
	case x >= 'a' && x <= 'f':
		return int(x-'a') + 10
	case x >= 'A' && x <= 'F':
		return int(x-'A') + 10
	}
	return -1
}

// skip tells how many bytes of p pass, without taking them.
func (b body) skip(p []byte) (int, error) { return b.take(p) }
