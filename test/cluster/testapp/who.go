package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// question is what the echo servers do not echo: who asks wants to know who
// answers.
const question = "who?"

// who asks an echo server, or by HTTP, for its name and for the caller's address
// as it sees it; one that greets is not asked.
func who(args []string) error {
	network, err := word(args, 0, "network, tcp, udp, http or greet,")
	if err != nil {
		return err
	}
	addr, err := word(args, 1, "address")
	if err != nil {
		return err
	}
	var name string
	switch network {
	case "http":
		name, err = whoHTTP(addr)
	case "greet":
		name, err = whoGreets(addr)
	default:
		name, err = whoEcho(network, addr)
	}
	if err != nil {
		return err
	}
	name, caller, _ := strings.Cut(strings.TrimSpace(name), " ")
	return report(name+" "+caller, map[string]string{"name": name, "caller": caller})
}

// whoTimeout is longer than the time that traffic has to find another server.
const whoTimeout = 5 * time.Second

func whoEcho(network, addr string) (string, error) {
	c, err := net.DialTimeout(network, addr, whoTimeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(whoTimeout))
	if _, err := io.WriteString(c, question); err != nil {
		return "", err
	}
	b := make([]byte, 512)
	n, err := c.Read(b)
	return string(b[:n]), err
}

func whoHTTP(addr string) (string, error) {
	client := http.Client{Timeout: whoTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + addr + "/who")
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(io.LimitReader(r.Body, 512))
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("answer %s: %s", r.Status, b)
	}
	return string(b), err
}

// whoGreets waits for a server that speaks first, and sends nothing before.
func whoGreets(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, whoTimeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(whoTimeout))
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return "", fmt.Errorf("wait for its greeting: %w", err)
	}
	hello := make([]byte, int(head[0])|int(head[1])<<8)
	if _, err := io.ReadFull(c, hello); err != nil {
		return "", fmt.Errorf("read its greeting: %w", err)
	}
	name, _, ok := bytes.Cut(hello[min(1, len(hello)):], []byte{0})
	if !ok || hello[0] != 10 {
		return "", fmt.Errorf("no greeting: %q", hello)
	}
	// It is a whole connection: what is sent comes back.
	if _, err := io.WriteString(c, question); err != nil {
		return "", err
	}
	back := make([]byte, len(question))
	if _, err := io.ReadFull(c, back); err != nil || string(back) != question {
		return "", fmt.Errorf("after its greeting came %q: %w", back, err)
	}
	return string(name), nil
}

// iAm answers the question.
func iAm(name string, caller net.Addr) string { return fmt.Sprintf("%s %v\n", name, caller) }
