package cluster

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http/httptest"
	"testing"
)

// counted counts the writes that reach the kernel.
type counted struct {
	net.Conn
	writes int
}

func (c *counted) Write(p []byte) (int, error) {
	c.writes++
	return c.Conn.Write(p)
}

// TestSocketGathers: the records of one message leave in one write, nothing
// stays behind, and what is not held is not delayed.
func TestSocketGathers(t *testing.T) {
	web := httptest.NewUnstartedServer(nil)
	web.StartTLS() // for its certificate
	defer web.Close()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", web.TLS)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	got := make(chan []byte, 4)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for _, n := range []int{64 << 10, 300 << 10, 5} {
			b := make([]byte, n)
			if _, err := io.ReadFull(c, b); err != nil {
				t.Error(err)
			}
			got <- b
		}
		_, _ = c.Write(bytes.Repeat([]byte{7}, 100<<10))
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	below := &counted{Conn: raw}
	s := newSocket(below)
	defer s.Close()
	c := tls.Client(s, &tls.Config{InsecureSkipVerify: true, DynamicRecordSizingDisabled: true})
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	send := func(n int, held bool) int {
		t.Helper()
		before := below.writes
		b := bytes.Repeat([]byte{byte(n)}, n)
		if held {
			s.hold()
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		if held {
			if err := s.release(); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(<-got, b) {
			t.Fatalf("%d bytes arrived otherwise", n)
		}
		return below.writes - before
	}
	if n := send(64<<10, true); n != 1 {
		t.Errorf("64 KiB took %d writes", n)
	}
	if n := send(300<<10, true); n > 5 {
		t.Errorf("300 KiB took %d writes", n)
	}
	if n := send(5, false); n != 1 {
		t.Errorf("5 bytes took %d writes", n)
	}
	back := make([]byte, 100<<10)
	if _, err := io.ReadFull(c, back); err != nil || !bytes.Equal(back, bytes.Repeat([]byte{7}, len(back))) {
		t.Error("the answer arrived otherwise", err)
	}
	raw.Close()
	s.hold()
	_, _ = c.Write([]byte("lost"))
	if s.release() == nil {
		t.Error("a lost write went unnoticed")
	}
}
