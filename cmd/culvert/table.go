package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/culvert-dev/culvert/daemon/api"
)

// table aligns columns. Text from the cluster is printed without control
// characters, so that no name there moves the cursor here.
type table struct {
	to   io.Writer
	text bytes.Buffer // what tabwriter made; it leaves blanks where last cells are empty
	w    *tabwriter.Writer
}

func newTable(to io.Writer) *table {
	t := &table{to: to}
	t.w = tabwriter.NewWriter(&t.text, 0, 8, 2, ' ', 0)
	return t
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = printable(c)
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() {
	t.w.Flush()
	for line := range strings.Lines(t.text.String()) {
		fmt.Fprintln(t.to, strings.TrimRight(line, " \n"))
	}
}

// printable drops control characters and keeps a text on one line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsControl(r):
			return -1
		}
		return r
	}, s)
}

func dnsText(d api.DNSStatus) string {
	switch d.Mode {
	case "":
		return "not set up"
	case "none":
		return "this machine's DNS is as it was (none)"
	}
	text := d.Mode
	if d.ClusterDomain != "" {
		text += ", " + d.ClusterDomain
	}
	if d.Server != "" {
		text += " at " + d.Server
	}
	return text
}

func agentText(a api.AgentStatus) string {
	if a.Pod == "" {
		return "none yet"
	}
	text := a.Namespace + "/" + a.Pod
	if a.Node != "" {
		text += " on " + a.Node
	}
	return text
}

func deviceText(s api.Session) string {
	text := s.Device
	for _, p := range s.Addresses {
		text += " " + p.Addr().String()
	}
	return text
}
