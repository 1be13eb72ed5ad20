package cluster

import (
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/culvert-dev/culvert/daemon/api"
)

// hintExpose is an --expose that is right.
const hintExpose = "give a local port and the Service's port, by number or name, e.g. --expose 8080:80 or --expose 5353:dns/udp"

// Expose is one --expose as typed: LOCAL[:REMOTE][/tcp|/udp].
type Expose struct {
	Local uint16 // of this machine
	// Remote is the Service's port, the port's name, or its targetPort (number or
	// name). Without one it is Local.
	Remote   string
	Protocol corev1.Protocol // empty: any

	text string
}

func (e Expose) String() string { return e.text }

// ParseExpose reads the values of --expose, each a list with commas. What is no
// port and what comes twice is an *api.Error with CodeUsage that names the entry.
func ParseExpose(texts []string) ([]Expose, error) {
	var all []Expose
	seen := map[Expose]string{}
	for _, text := range texts {
		for _, entry := range strings.Split(text, ",") {
			if entry = strings.TrimSpace(entry); entry == "" {
				continue
			}
			e, err := parseExpose(entry)
			if err != nil {
				return nil, exposeError(entry, err.Error())
			}
			key := Expose{Local: e.Local, Remote: e.Remote, Protocol: e.Protocol}
			if other, ok := seen[key]; ok {
				return nil, exposeError(entry, fmt.Sprintf("is there twice: %q says the same", other))
			}
			seen[key] = entry
			all = append(all, e)
		}
	}
	if len(all) == 0 {
		return nil, &api.Error{Code: api.CodeUsage, Message: "--expose is missing: which local port shall answer?", Hint: hintExpose}
	}
	return all, nil
}

func exposeError(entry, why string) error {
	return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("--expose %q: %s", entry, why), Hint: hintExpose}
}

func parseExpose(entry string) (e Expose, err error) {
	e.text = entry
	ports, protocol, has := strings.Cut(entry, "/")
	if has {
		switch e.Protocol = corev1.Protocol(strings.ToUpper(protocol)); e.Protocol {
		case corev1.ProtocolTCP, corev1.ProtocolUDP:
		default:
			return e, fmt.Errorf("%q is neither tcp nor udp", protocol)
		}
	}
	local, remote, both := strings.Cut(ports, ":")
	if e.Local, err = parsePort(local); err != nil {
		return e, err
	}
	switch {
	case !both:
		e.Remote = strconv.Itoa(int(e.Local))
	case remote == "":
		return e, fmt.Errorf("nothing follows the colon")
	case strings.Trim(remote, "0123456789") == "":
		n, err := parsePort(remote)
		if err != nil {
			return e, err
		}
		e.Remote = strconv.Itoa(int(n)) // 080 is 80
	default:
		if len(validation.IsDNS1123Label(remote)) > 0 {
			return e, fmt.Errorf("%q is neither a port number nor a port's name", remote)
		}
		e.Remote = remote
	}
	return e, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is no port number", s)
	case n == 0 || n > 65535:
		return 0, fmt.Errorf("port %d is not between 1 and 65535", n)
	}
	return uint16(n), nil
}
