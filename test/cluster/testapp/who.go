package main

import (
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
// as it sees it.
func who(args []string) error {
	network, err := word(args, 0, "network, tcp, udp or http,")
	if err != nil {
		return err
	}
	addr, err := word(args, 1, "address")
	if err != nil {
		return err
	}
	var name string
	if network == "http" {
		name, err = whoHTTP(addr)
	} else {
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

// iAm answers the question.
func iAm(name string, caller net.Addr) string { return fmt.Sprintf("%s %v\n", name, caller) }
