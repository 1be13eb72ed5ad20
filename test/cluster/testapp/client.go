package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// get takes its flags before the URL, also --resolve, whose value is an address.
func get(args []string) error {
	var add headers
	f := flag.NewFlagSet("get", flag.ContinueOnError)
	f.Var(&add, "header", "NAME:VALUE, several times")
	http2 := f.Bool("http2", false, "HTTP/2, without asking for it")
	addr := f.String("resolve", "", "dial this address instead of the URL's")
	if err := f.Parse(args); err != nil {
		return err
	}
	args = f.Args()
	dial := (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	if *addr != "" {
		plain := dial
		dial = func(ctx context.Context, network, _ string) (net.Conn, error) { return plain(ctx, network, *addr) }
	}
	url, err := word(args, 0, "URL")
	if err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	add.put(req)
	client := http.Client{Timeout: 60 * time.Second, Transport: newTransport(dial, *http2)}
	r, err := client.Do(req)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	if _, err := io.Copy(out, r.Body); err != nil {
		return fmt.Errorf("read the body: %w", err)
	}
	if r.StatusCode >= 400 {
		return fmt.Errorf("answer %s", r.Status)
	}
	return nil
}

func lookup(args []string) error {
	name, err := word(args, 0, "name")
	if err != nil {
		return err
	}
	addrs, err := net.LookupHost(name)
	if err != nil {
		return err
	}
	return report(strings.Join(addrs, "\n"), map[string]any{"name": name, "addresses": addrs})
}

func put(args []string) error {
	url, err := word(args, 0, "URL")
	if err != nil {
		return err
	}
	n, err := number(args, 1, 1<<20)
	if err != nil {
		return err
	}
	body := make([]byte, n)
	rand.Read(body)
	req, err := http.NewRequest(http.MethodPut, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	start := time.Now()
	r, err := (&http.Client{Timeout: 10 * time.Minute}).Do(req)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	var got struct {
		SHA256 string
		Length int
	}
	if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
		return fmt.Errorf("answer %s: %w", r.Status, err)
	}
	want := sha256.Sum256(body)
	if got.Length != n || got.SHA256 != hex.EncodeToString(want[:]) {
		return fmt.Errorf("%d bytes were sent, %d arrived with checksum %s, not %x", n, got.Length, got.SHA256, want)
	}
	d := time.Since(start).Seconds()
	return report(fmt.Sprintf("%d bytes arrived whole, %.1f s", n, d), map[string]any{"bytes": n, "seconds": d})
}

func udp(args []string) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	size, err := number(args, 1, 512)
	if err != nil {
		return err
	}
	count, err := number(args, 2, 1)
	if err != nil {
		return err
	}
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	out, in := make([]byte, size), make([]byte, 64<<10)
	lost := 0
	for range count {
		rand.Read(out)
		if _, err := c.Write(out); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		n, err := c.Read(in)
		if err != nil {
			lost++
			continue
		}
		if !bytes.Equal(in[:n], out) {
			return fmt.Errorf("another datagram came back: %d bytes of %d", n, size)
		}
	}
	if lost == count {
		return fmt.Errorf("all %d datagrams of %d bytes were lost", count, size)
	}
	return report(fmt.Sprintf("%d datagrams of %d bytes, %d lost", count, size, lost), map[string]any{"sent": count, "lost": lost, "size": size})
}
