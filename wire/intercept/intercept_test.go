package intercept

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
)

func TestHeader(t *testing.T) {
	for _, h := range []Header{
		{Network: Watch},
		{Network: TCP, ID: "i1", Token: "t"},
		{Network: UDP, ID: "ü\n\"", Token: strings.Repeat("t", 200), Client: netip.MustParseAddrPort("10.0.0.1:5"), Server: netip.MustParseAddrPort("[fd00::1]:80")},
	} {
		var b bytes.Buffer
		if err := WriteHeader(&b, h); err != nil {
			t.Fatal(err)
		}
		b.WriteString("rest")
		got, err := ReadHeader(&b)
		if err != nil || got != h {
			t.Errorf("%+v came back as %+v, %v", h, got, err)
		}
		if b.String() != "rest" {
			t.Errorf("%q is left of what follows the header", b.String())
		}
	}
}

// writes counts the writes, each of which may be a packet.
type writes struct {
	bytes.Buffer
	n int
}

func (w *writes) Write(b []byte) (int, error) { w.n++; return w.Buffer.Write(b) }

func TestOneWrite(t *testing.T) {
	var w writes
	if err := WriteHeader(&w, Header{Network: TCP, ID: "x"}); err != nil || w.n != 1 {
		t.Errorf("a header takes %d writes, %v", w.n, err)
	}
	w.n = 0
	if err := WriteDatagram(&w, []byte("x"), nil); err != nil || w.n != 1 {
		t.Errorf("a datagram takes %d writes, %v", w.n, err)
	}
}

func TestHeaderBounds(t *testing.T) {
	var b bytes.Buffer
	if err := WriteHeader(&b, Header{Token: strings.Repeat("t", maxHeader)}); err == nil || b.Len() > 0 {
		t.Errorf("a header that is too long: %v, and %d bytes were sent", err, b.Len())
	}
	framed := func(size int, text string) string {
		return string(binary.BigEndian.AppendUint16(nil, uint16(size))) + text
	}
	for name, in := range map[string]string{
		"too long":    framed(maxHeader+1, strings.Repeat(" ", maxHeader+1)),
		"cut":         framed(10, `{"net"`),
		"cut size":    "\x00",
		"nothing":     "",
		"empty":       framed(0, ""),
		"no JSON":     framed(3, "GET"),
		"bad address": framed(17, `{"client":"a:80"}`),
		"HTTP":        "GET / HTTP/1.1\r\n\r\n",
	} {
		if h, err := ReadHeader(strings.NewReader(in)); err == nil {
			t.Errorf("%s: taken for %+v", name, h)
		}
	}
	if _, err := ReadHeader(strings.NewReader(framed(10, `{"net"`))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a header that ends early: %v", err)
	}
	// A newer end may say more.
	if h, err := ReadHeader(strings.NewReader(framed(23, `{"net":"tcp","new":[1]}`))); err != nil || h.Network != TCP {
		t.Errorf("with a field that nobody knows: %+v, %v", h, err)
	}
}

func TestStatus(t *testing.T) {
	for s := range statusNames {
		var b bytes.Buffer
		if err := WriteStatus(&b, s); err != nil || b.Len() != 1 {
			t.Fatalf("%v: %d bytes, %v", s, b.Len(), err)
		}
		if got, err := ReadStatus(&b); err != nil || got != s {
			t.Errorf("%v came back as %v, %v", s, got, err)
		}
	}
	for _, bad := range []string{"", "\x00", "\x06", "H"} {
		if s, err := ReadStatus(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is taken for %v", bad, s)
		}
	}
	if text := Status(77).String(); text != "status 77" {
		t.Errorf("an unknown one is %q", text)
	}
}

func TestDatagram(t *testing.T) {
	var b bytes.Buffer
	scratch, buf := make([]byte, 2+MaxDatagram), make([]byte, MaxDatagram)
	sent := [][]byte{{}, []byte("x"), bytes.Repeat([]byte("d"), MaxDatagram)}
	for i, p := range sent {
		if err := WriteDatagram(&b, p, [][]byte{nil, scratch, scratch}[i]); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range sent {
		n, err := ReadDatagram(&b, buf)
		if err != nil || !bytes.Equal(buf[:n], p) {
			t.Errorf("%d bytes came back as %d, %v", len(p), n, err)
		}
	}
	if _, err := ReadDatagram(&b, buf); err != io.EOF {
		t.Errorf("the end: %v", err)
	}
	if err := WriteDatagram(&b, make([]byte, MaxDatagram+1), nil); err == nil || b.Len() > 0 {
		t.Errorf("one that is too long: %v, and %d bytes were sent", err, b.Len())
	}
	if _, err := ReadDatagram(strings.NewReader("\x00\x05hello"), make([]byte, 4)); err == nil {
		t.Error("one that is longer than the buffer is read")
	}
	if _, err := ReadDatagram(strings.NewReader("\x00\x05hel"), buf); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("one that ends early: %v", err)
	}
	if _, err := ReadDatagram(strings.NewReader("\xff\xff"+strings.Repeat("d", 65535)), make([]byte, 65535)); err == nil {
		t.Error("one that UDP cannot carry is read")
	}
	if n := testing.AllocsPerRun(100, func() { b.Reset(); _ = WriteDatagram(&b, buf[:1000], scratch) }); n > 0 {
		t.Errorf("with scratch space %v allocations", n)
	}
}
