package gate

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/culvert-dev/culvert/wire/intercept"
)

const benchAnswer = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"

// BenchmarkMesh is one request after the other on one connection: directly, by the
// router to the origin, and among 250 members.
func BenchmarkMesh(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 4096)
				for {
					if _, err := c.Read(buf); err != nil {
						return
					}
					if _, err := io.WriteString(c, benchAnswer); err != nil {
						return
					}
				}
			}()
		}
	}()
	ask := func(b *testing.B, addr string) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		br := bufio.NewReader(c)
		request := []byte("GET /path HTTP/1.1\r\nHost: web\r\nUser-Agent: bench\r\nAccept: */*\r\nVERSION: none\r\n\r\n")
		answer := make([]byte, len(benchAnswer))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.Write(request); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(br, answer); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("direct", func(b *testing.B) { ask(b, l.Addr().String()) })
	for _, n := range []int{1, 250} {
		b.Run(fmt.Sprint("router-", n), func(b *testing.B) {
			a := startAgent(b, nil)
			g := startGate(b, Config{}, nil)
			route := meshRoute(b, l.Addr().String(), intercept.HTTPSniff)
			var members []intercept.Member
			for i := range n {
				members = append(members, meshMember(fmt.Sprint(i), a, fmt.Sprintf("header:VERSION=v%d", i)))
			}
			g.push(meshState(1, route, members...))
			ask(b, fmt.Sprintf("127.0.0.1:%d", route.Listen))
		})
	}
}
