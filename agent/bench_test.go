package agent

import (
	"io"
	"net"
	"sync"
	"testing"
)

// The benchmarks go through everything but the API server: the client's stack,
// WireGuard, a TCP stream, WireGuard, the agent's stack, a socket.

func BenchmarkUp(b *testing.B) {
	a := startAgent(b, Config{}, nil)
	c := connect(b, a, true)
	var wg sync.WaitGroup
	wg.Add(1)
	conn := c.mustTCP(serve(b, target, func(s *net.TCPConn) {
		defer wg.Done()
		buf := make([]byte, 256<<10)
		for {
			if _, err := s.Read(buf); err != nil {
				s.Close()
				return
			}
		}
	}))
	chunk := make([]byte, 256<<10)
	b.SetBytes(int64(len(chunk)))
	b.ResetTimer()
	for range b.N {
		if _, err := conn.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	_ = conn.CloseWrite()
	wg.Wait()
}

func BenchmarkDown(b *testing.B) {
	a := startAgent(b, Config{}, nil)
	c := connect(b, a, true)
	chunk := make([]byte, 256<<10)
	conn := c.mustTCP(serve(b, target, func(s *net.TCPConn) {
		defer s.Close()
		_, _ = s.Read(make([]byte, 1))
		for range b.N {
			if _, err := s.Write(chunk); err != nil {
				return
			}
		}
	}))
	b.SetBytes(int64(len(chunk)))
	b.ResetTimer()
	_, _ = conn.Write([]byte("x"))
	buf := make([]byte, 256<<10)
	for left := b.N * len(chunk); left > 0; {
		n, err := conn.Read(buf)
		if err != nil && err != io.EOF {
			b.Fatal(err)
		}
		left -= n
	}
}

func BenchmarkConnect(b *testing.B) {
	a := startAgent(b, Config{}, nil)
	c := connect(b, a, true)
	addr := serve(b, target, func(s *net.TCPConn) { _, _ = s.Write([]byte{1}); s.Close() })
	b.ResetTimer()
	for range b.N {
		conn := c.mustTCP(addr)
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	a := startAgent(b, Config{}, nil)
	c := connect(b, a, true)
	conn := c.mustTCP(serve(b, target, echoTCP))
	one := make([]byte, 1)
	b.ResetTimer()
	for range b.N {
		_, _ = conn.Write(one)
		if _, err := io.ReadFull(conn, one); err != nil {
			b.Fatal(err)
		}
	}
}
